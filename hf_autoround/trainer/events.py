# SPDX-License-Identifier: Apache-2.0
"""From the stream's events to transformers' callbacks: epoch = block, step = iteration.

A block's log entries are kept in its journal record, so that a resumed run ends with the same history.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_autoround.planning.plan import QuantPlan
from hf_autoround.tuning import BlockResult

if TYPE_CHECKING:
    from hf_autoround.trainer.trainer import RoundingTrainer


class TrainingStopped(Exception):
    """A callback asked to stop; its text names the last finished block."""


class TrainerEvents:
    """Keeps a trainer's state and calls its callbacks."""

    def __init__(self, trainer: RoundingTrainer, plan: QuantPlan, steps_per_block: int, blocks: int) -> None:
        self.trainer, self.plan, self.steps_per_block, self.blocks = trainer, plan, steps_per_block, blocks
        self.logs: list[dict[str, Any]] = []
        self.started: float | None = None

    def block_begins(self, place: int, unit: str, names: tuple[str, ...]) -> None:
        """A block is about to be loaded."""
        self.logs, self.started = [], time.time()
        trainer = self.trainer
        trainer.state.epoch = float(place)
        trainer.state.global_step = place * self.steps_per_block
        self._call("on_epoch_begin", block=_block_name(names))

    def step_ends(self, place: int, step: int, loss: float, lr: float) -> bool:
        """An iteration is over; say whether a callback wants the block to end here."""
        state, args = self.trainer.state, self.trainer.args
        state.global_step = place * self.steps_per_block + step + 1
        state.epoch = place + (step + 1) / self.steps_per_block
        self._call("on_step_end", loss=loss)
        if args.logging_steps and state.global_step % max(1, int(args.logging_steps)) == 0:
            entry = {"loss": loss, "learning_rate": lr, "epoch": state.epoch, "step": state.global_step}
            self.logs.append(entry)
            self.trainer.log(entry)
        control = self.trainer.control
        return self.trainer.processes.any(control.should_epoch_stop or control.should_training_stop)

    def block_decided(
        self, place: int, unit: str, names: tuple[str, ...], result: BlockResult, rows: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A block's numbers are known: return the record that is stored with them."""
        schemes: dict[str, int] = {}
        for site in self.plan.sites:
            if site.parameter in result.layers:
                name = self.plan.schemes[site.name].name
                schemes[name] = schemes.get(name, 0) + 1
        entry: dict[str, Any] = {
            "block": _block_name(names),
            "layers": ", ".join(f"{count} x {name}" for name, count in schemes.items()),
            "loss_first": result.loss_first,
            "loss_best": result.loss_best,
            "best_step": result.best_step,
            "errors": {name.removesuffix(".weight"): round(layer.error, 5) for name, layer in result.layers.items()},
            "epoch": float(place + 1),
            "step": (place + 1) * self.steps_per_block,
        }
        seen = {name.rpartition(".")[0]: counts.tolist() for name, counts in rows.items() if counts.ndim}
        if seen:
            entry["expert_tokens"] = seen
            entry["experts"] = "; ".join(_coverage(module, counts) for module, counts in seen.items())
        return {"history": [*self.logs, entry]}

    def block_ends(self, place: int, unit: str, record: Mapping[str, Any]) -> None:
        """A block is in the journal, by this run or an earlier one."""
        state = self.trainer.state
        state.epoch, state.global_step = float(place + 1), (place + 1) * self.steps_per_block
        state.log_history.extend(record["history"])
        seconds = time.time() - self.started if self.started is not None else None
        self.trainer.log(record["history"][-1], seconds=seconds)
        self._call("on_epoch_end")
        if self.trainer.processes.any(self.trainer.control.should_training_stop) and place + 1 < self.blocks:
            raise TrainingStopped(record["history"][-1]["block"])

    def _call(self, event: str, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.control = trainer.callback_handler.call_event(event, trainer.args, trainer.state, trainer.control, **kwargs)
        if event == "on_epoch_begin":
            trainer.control.should_epoch_stop = False


def _block_name(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"


def _coverage(module: str, counts: list[int]) -> str:
    """Return a sentence on how many tokens each expert of a module was tuned on; those without are only rounded."""
    unseen = [str(expert) for expert, count in enumerate(counts) if count == 0]
    middle = sorted(counts)[len(counts) // 2]
    line = f"{len(counts)} experts of {module} saw {min(counts)} to {max(counts)} tokens, median {middle}"
    return line + (f"; rounded without data: {', '.join(unseen)}" if unseen else "")
