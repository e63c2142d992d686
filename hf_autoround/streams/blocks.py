# SPDX-License-Identifier: Apache-2.0
"""The order of events when blocks are quantized one after the other.

For each block: load it, compute the float model's outputs (targets, where something is tuned), let the algorithm decide its
numbers on the inputs that the already quantized blocks produce, store them in the journal, go on with the quantized block's
outputs, drop it. A block that the journal already has is only run, not decided again. Several processes do this side by side,
each with its share of the samples; the journal is the main one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from hf_autoround.streams.block_walk import BlockWalk, PlannedModel, StreamSettings, units
from hf_autoround.streams.journal import Journal
from hf_autoround.tuning import BlockAlgorithm, BlockResult, TuningSettings


class StreamEvents(Protocol):
    """What the stream tells whoever watches."""

    def block_begins(self, place: int, unit: str, names: tuple[str, ...]) -> None: ...
    def step_ends(self, place: int, step: int, loss: float, lr: float) -> bool: ...
    def block_decided(self, place: int, unit: str, names: tuple[str, ...], result: BlockResult, rows: Any) -> dict[str, Any]: ...
    def block_ends(self, place: int, unit: str, record: Mapping[str, Any]) -> None: ...


def stream_blocks(
    model: PlannedModel,
    algorithm: BlockAlgorithm,
    tuning: TuningSettings,
    settings: StreamSettings,
    journal: Journal,
    events: StreamEvents,
) -> None:
    """Bring every block of the model into the journal.

    Raises CheckpointError or CalibrationError naming the layer whose weights or outputs are not finite.
    """
    all_units, main = units(model.parts, model.plan, settings.nblocks), settings.processes.from_main
    done = main(lambda: {unit.key: journal.record(unit.key) for unit in all_units if journal.has(unit.key)})
    if len(done) == len(all_units):
        for place, unit in enumerate(all_units):
            events.block_ends(place, unit.key, done[unit.key])
        return
    walk = BlockWalk(model, tuning.batch_size, settings, tunes=tuning.iters > 0)
    walk.begin()
    for place, unit in enumerate(all_units):
        finished = unit.key in done
        events.block_begins(place, unit.key, unit.names)
        with walk.resident(unit) as runner:
            statistics = walk.advance_float(runner, watch=not finished)
            if finished:
                result, record = main(partial(journal.get, unit.key, walk.schemes)).to(walk.device), done[unit.key]
                runner = walk.quantizing(runner, result.static)
            else:
                static = walk.calibrated(runner, statistics)
                runner = walk.quantizing(runner, static)
                task = walk.task(place, runner, statistics, static)
                on_step = partial(events.step_ends, place)
                result = algorithm(task, tuning, on_step) if task.weights else BlockResult({})
                record = events.block_decided(place, unit.key, unit.names, result, statistics.rows)
                main(partial(journal.put, unit.key, result, record))
            if place + 1 < len(all_units):
                walk.advance_quantized(runner, result)
        events.block_ends(place, unit.key, record)
