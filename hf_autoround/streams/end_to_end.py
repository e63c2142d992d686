# SPDX-License-Identifier: Apache-2.0
"""Tuning end to end, set up: a teacher from one pass of the float model, every block's numbers on a shelf, a journal.

The blocks' modules stay empty; each runs on the parameters it is given. What is on the shelf is on the device of the
products (resident), or waits in host memory or mapped files and visits the device one block at a time, the next one fetched
ahead (streamed). The arithmetic is the same, and so are the bits.

Shapes: N samples (of this process' share), T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import psutil
import torch
from torch import Tensor
from transformers.utils import logging

from hf_autoround.errors import CalibrationError
from hf_autoround.layers.activations import InputQuantizer, quantized_inputs
from hf_autoround.models.memory import release_memory
from hf_autoround.models.walk import BlockRunner
from hf_autoround.streams.block_walk import BlockWalk, PlannedModel, StreamSettings, Unit, units
from hf_autoround.streams.end_to_end_journal import EndToEndJournal
from hf_autoround.streams.journal import Journal
from hf_autoround.streams.shelf import Shelf
from hf_autoround.streams.visits import Visits
from hf_autoround.tuning import BlockResult, teacher
from hf_autoround.tuning.end_to_end import EndToEndSettings, EndToEndTask, LearnedBlock, Progress, end_to_end, first_state

logger = logging.get_logger(__name__)
Residence = Literal["auto", "resident", "streamed"]


class EndToEndEvents(Protocol):
    """What the stage tells whoever watches. `log` is kept in checkpoints, so that a resumed run has the whole of it."""

    log: list[dict[str, Any]]

    def stage_begins(self, progress: Progress, residence: str) -> None: ...
    def step_ends(self, step: int, loss: float, lr: float) -> bool: ...
    def measured(self, progress: Progress, held_out: float) -> None: ...
    def wants_checkpoint(self, step: int) -> bool: ...
    def checkpoint_written(self, step: int) -> None: ...
    def stage_ends(self, progress: Progress) -> None: ...


def stream_end_to_end(
    model: PlannedModel,
    tuning: EndToEndSettings,
    settings: StreamSettings,
    residence: Residence,
    journal: Journal,
    events: EndToEndEvents,
) -> Journal:
    """Tune all blocks together from what the journal holds of them, and return the journal of the final numbers.

    Raises CalibrationError if the float model's outputs are not finite.
    """
    record, main = EndToEndJournal(journal), settings.processes.from_main
    over = main(record.finished)
    if over is None:
        with TemporaryDirectory() as elsewhere:
            folder = journal.folder / "mapped" if settings.processes.main else Path(elsewhere)
            stage = _Stage(BlockWalk(model, tuning.batch_size, settings), tuning, residence, journal, events, folder)
            over = stage.run(), events.log
            del stage
        release_memory()
        main(partial(record.finish, *over))
    else:
        events.log[:] = over[1]
    events.stage_ends(over[0])
    return record.best(over[0].best_step)


class _Stage:
    """One run of the stage: builds the task and is its watcher."""

    def __init__(
        self,
        walk: BlockWalk,
        tuning: EndToEndSettings,
        residence: Residence,
        journal: Journal,
        events: EndToEndEvents,
        folder: Path,
    ) -> None:
        self.walk, self.lazy, self.settings = walk, walk.lazy, walk.settings
        self.journal, self.events, self.tuning = journal, events, tuning
        self.record = EndToEndJournal(journal)
        self.units = units(walk.parts, walk.plan, walk.settings.nblocks)
        self.products = self.walk.autocast or self.walk.dtype
        if residence == "auto":
            residence = "resident" if 2 * self._needed() < _free_memory(self.walk.device) else "streamed"
        self.residence, host = residence, torch.device("cpu")
        in_memory = self.travels and self.walk.device.type == "cuda" and self._locked() < 0.8 * _free_memory(host)
        self.samples = Shelf(host, None if in_memory else folder, page_locked=in_memory)
        self.shelf = self.samples if residence == "streamed" else Shelf(self.walk.device)
        self.kept_blocks = 0  # not known before the first step
        self.head_inputs: Mapping[str, tuple[bool, InputQuantizer]] = {}

    def run(self) -> Progress:
        """Do the whole stage and return where it ended."""
        main = self.settings.processes.from_main
        latest = main(self.record.latest)
        progress = Progress() if latest is None else latest[0]
        if latest is not None:
            self.events.log[:] = latest[1]
        self.runners: list[BlockRunner] = []
        self.blocks: list[LearnedBlock] = []
        self._read_float_model()
        if latest is not None:
            for unit, block in zip(self.units, self.blocks, strict=True):
                for name, tensor in main(partial(self.record.load, unit.key)).items():
                    block.state[name].copy_(tensor)
        self.visits = Visits(self.blocks, self.walk.device) if self.travels else None
        self.events.stage_begins(progress, self.residence)
        return end_to_end(self._task(), self.tuning, self, progress)

    def step_ends(self, step: int, loss: float, lr: float) -> bool:
        return self.events.step_ends(step, loss, lr)

    def measured(self, progress: Progress, held_out: float) -> None:
        if not isfinite(held_out):
            logger.warning(
                f"end to end tuning has diverged by step {progress.step}: the best so far, of step {progress.best_step}, is "
                f"kept; a smaller end_to_end_lr than {self.tuning.lr:.3g} may help"
            )
        if progress.best_step == progress.step:
            self.settings.processes.from_main(partial(self.record.put_best, progress.step, self._results()))
        self.events.measured(progress, held_out)

    def may_save(self, progress: Progress) -> None:
        if self.events.wants_checkpoint(progress.step):
            if self.visits is not None:
                self.visits.settle()
            states = ((unit.key, block.state) for unit, block in zip(self.units, self.blocks, strict=True))
            self.settings.processes.from_main(partial(self.record.save, progress, self.events.log, states))
            self.events.checkpoint_written(progress.step)

    def _results(self) -> Iterator[tuple[str, BlockResult]]:
        """Yield the blocks as they would ship."""
        for place, unit in enumerate(self.units):
            with self.open(place, False) as block:
                yield unit.key, block.finished()

    @contextmanager
    def open(self, place: int, changes: bool) -> Iterator[LearnedBlock]:
        """Give a block on the device of the products."""
        if self.visits is not None:
            with self.visits.open(place, changes) as block:
                yield block
            return
        yield self.blocks[place]
        if self.residence == "streamed":
            release_memory()

    def _read_float_model(self) -> None:
        """Put every block on the shelf, and remember what the float model says."""
        walk = self.walk
        walk.begin()
        self.inputs = self.samples.keep("inputs", {"hidden": walk.float_inputs})["hidden"]
        hidden = walk.float_inputs
        for unit in self.units:
            if unit.key == "head":
                continue
            with walk.resident(unit) as runner:
                self._shelve(unit, runner)
                hidden = runner.all(hidden, {}, walk.share.batch_size)
        if not torch.isfinite(hidden).all():
            raise CalibrationError(
                "the float model's outputs hold NaN or infinity; its weights are damaged, or bfloat16 overflows: try disable_amp"
            )
        self.head = walk.load_end()
        size = {"hidden": (tuple(hidden.shape), self.products)}
        self.teacher = self.samples.room("teacher", size)["hidden"]
        for indices in torch.arange(len(hidden)).split(walk.share.batch_size):
            with torch.no_grad():
                self.teacher[indices] = self.head.finished(hidden[indices].to(walk.device), walk.tokens[indices]).to(self.teacher)
        if self.units[-1].key == "head":
            module = self.lazy.model.get_submodule(self.units[-1].names[0])
            runner = BlockRunner(self.units[-1].names, (module,), (), walk.device)
            self._shelve(self.units[-1], runner)

    @torch.no_grad()
    def _shelve(self, unit: Unit, runner: BlockRunner) -> None:
        """Put a loaded unit's parameters, and what the journal knows of it, on the shelf."""
        walk = self.walk
        result: BlockResult = self.settings.processes.from_main(partial(self.journal.get, unit.key, walk.schemes))
        result = result.to(walk.device)
        parameters = {
            name: parameter.detach()
            for block_name, block in zip(runner.names, runner.blocks, strict=True)
            for name, parameter in block.named_parameters(prefix=block_name)
        }
        on_main = {name: (tensor.to(walk.device), transposed) for name, tensor, transposed in walk.weights(runner)}
        loaded = walk.tunable(on_main, result.static)
        norms = walk.norms(runner, loaded) if self.tuning.tunes_norms else {}
        state = self.shelf.keep(f"{unit.key}-state", first_state(loaded, norms, result))
        fixed = self.shelf.keep(f"{unit.key}-parameters", parameters)
        weights = {name: replace(weight, parameter=fixed[name]) for name, weight in loaded.items()}
        others = {name: tensor for name, tensor in fixed.items() if name not in weights}
        self.blocks.append(LearnedBlock(weights, others, tuple(norms), state, walk.stored, self.products))
        quantizing = walk.quantizing(runner, result.static)
        if unit.key == "head":
            self.head_inputs = quantizing.inputs
        else:
            self.runners.append(quantizing)

    def _task(self) -> EndToEndTask:
        walk, head = self.walk, self.head
        where = walk.share.place

        def finished(hidden: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
            own = where[indices]
            return head.finished(hidden, walk.tokens[own]), self.teacher[own].to(walk.device)

        learns_head = self.units[-1].key == "head"

        def heads(parameters: Mapping[str, Tensor]) -> teacher.Heads:
            inputs = {name: (parameters[name], *how) for name, how in self.head_inputs.items() if name in parameters}

            def student(states: Tensor) -> Tensor:
                with quantized_inputs(inputs):
                    return head.logits(states, parameters)

            return teacher.Heads(student, head.logits, not learns_head and head.linear)

        def measure(hidden: Tensor, indices: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
            mine, theirs = finished(hidden, indices)
            return teacher.divergence(heads(parameters), mine.flatten(0, 1), theirs.flatten(0, 1), head.rows)

        def backward(hidden: Tensor, indices: Tensor, parameters: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
            leaf = hidden.requires_grad_()
            mine, theirs = finished(leaf, indices)
            kl, gradient = teacher.backward(
                heads(parameters), mine.detach().flatten(0, 1), theirs.flatten(0, 1), head.rows, scale
            )
            mine.backward(teacher.evened(gradient).view_as(mine))
            assert leaf.grad is not None
            return kl, leaf.grad

        def run(place: int, hidden: Tensor, indices: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
            return self.runners[place](hidden, where[indices], parameters)

        def keep(place: int, hidden: list[Tensor]) -> Callable[[], list[Tensor]]:
            if self.residence == "resident":
                return lambda: hidden
            kept = self.samples.keep(f"entering-{place:05d}", {str(number): state for number, state in enumerate(hidden)})
            return lambda: [state.to(walk.device) for state in kept.values()]

        return EndToEndTask(
            seed=self.settings.seed * 1_000_003 + len(self.units),
            samples=walk.samples,
            tokens=walk.tokens.shape[1],
            blocks=len(self.runners),
            learns_head=learns_head,
            open=self.open,
            inputs=lambda indices: self.inputs[where[indices]].to(walk.device),
            run=run,
            measure=measure,
            backward=backward,
            share=walk.share.of,
            total=self.settings.processes.total,
            kept_blocks=lambda: self.kept_blocks,
            one_kept=self._keep_what_fits,
            keep=keep,
        )

    def _keep_what_fits(self, one: int) -> None:
        """Decide, when the first step with samples tells what one block's forward takes, for how many it is kept."""
        if self.kept_blocks == 0 and one:
            room = _free_memory(self.walk.device) // (2 * one) if self.residence == "resident" else 0
            self.kept_blocks = max(1, min(room, len(self.runners)))

    @property
    def travels(self) -> bool:
        """Say whether blocks have to be copied to the device; for a CPU mapped files are memory as good as any other."""
        return self.residence == "streamed" and self.walk.device.type != "cpu"

    def _needed(self) -> int:
        """Return how many bytes all weights take, with nine for each that is learned."""
        entries = self.lazy.checkpoint.entries.values()
        return sum(entry.nbytes + 9 * (entry.nbytes // entry.dtype.itemsize) for entry in entries)

    def _locked(self) -> int:
        """Return how many bytes of page-locked memory all processes would take, without the scales: torch gives it in powers
        of two."""

        def given(size: int) -> int:
            return 1 << (size - 1).bit_length()

        sizes = [entry.nbytes // entry.dtype.itemsize for entry in self.lazy.checkpoint.entries.values()]
        weights = sum(given(size * self.walk.dtype.itemsize) + given(4 * size) + 2 * given(2 * size) for size in sizes)
        hidden = self.walk.tokens.numel() * self.lazy.model.config.get_text_config().hidden_size * self.walk.dtype.itemsize
        batch = -(-hidden * self.tuning.batch_size * self.tuning.gradient_accumulate_steps // len(self.walk.tokens))
        return self.settings.processes.count * (weights + 2 * given(hidden) + len(self.units) * given(batch))


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
