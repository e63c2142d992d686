# SPDX-License-Identifier: Apache-2.0
"""From the events of tuning end to end to transformers' callbacks: the stage is one epoch, after those of the blocks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hf_autoround.trainer.events import TrainingStopped
from hf_autoround.tuning.end_to_end import Progress

if TYPE_CHECKING:
    from hf_autoround.trainer.trainer import RoundingTrainer


class EndToEndTrainerEvents:
    """Keeps a trainer's state and calls its callbacks; `steps_before` are those of the block stage, in `epochs_before`."""

    def __init__(self, trainer: RoundingTrainer, steps: int, steps_before: int, epochs_before: int) -> None:
        self.trainer, self.steps = trainer, steps
        self.steps_before, self.epochs_before = steps_before, epochs_before
        self.log: list[dict[str, Any]] = []
        self.loss: float | None = None
        self.started = time.time()

    def stage_begins(self, progress: Progress, residence: str) -> None:
        """The float model has been read; steps follow."""
        self.started = time.time()
        self._at(progress.step)
        self._call("on_epoch_begin", block=f"end to end ({residence})")

    def step_ends(self, step: int, loss: float, lr: float) -> bool:
        """A step is over; say whether a callback wants the stage to end here, with the best so far."""
        self.loss = loss
        self._at(step + 1)
        self._call("on_step_end", loss=loss)
        logging_steps = self.trainer.args.logging_steps
        if logging_steps and (step + 1) % max(1, int(logging_steps)) == 0:
            state = self.trainer.state
            self._say({"loss": loss, "learning_rate": lr, "epoch": state.epoch, "step": state.global_step})
        return self.trainer.processes.any(self.trainer.control.should_epoch_stop)

    def measured(self, progress: Progress, held_out: float) -> None:
        """The held-out KL divergence after some steps is known."""
        entry = {"end_to_end_step": progress.step, "held_out_kl": held_out, "best_step": progress.best_step}
        if self.loss is not None:
            entry["training_kl"] = self.loss
        self._say(entry, seconds=time.time() - self.started, steps=self.steps)

    def wants_checkpoint(self, step: int) -> bool:
        """Say whether the numbers of this step are to be kept on disk."""
        every = int(self.trainer.args.save_steps)
        return step < self.steps and (self._stopping() or (every > 0 and step % every == 0))

    def checkpoint_written(self, step: int) -> None:
        """A checkpoint is on disk."""
        self._call("on_save")
        if self._stopping():
            raise TrainingStopped(f"step {step} of end to end tuning")

    def stage_ends(self, progress: Progress) -> None:
        """The stage is over, in this run or an earlier one."""
        self._at(self.steps)
        self.trainer.state.log_history.extend(self.log)
        self._call("on_epoch_end")

    def _at(self, step: int) -> None:
        state = self.trainer.state
        state.global_step, state.epoch = self.steps_before + step, self.epochs_before + step / self.steps

    def _stopping(self) -> bool:
        return self.trainer.processes.any(self.trainer.control.should_training_stop)

    def _say(self, entry: dict[str, Any], **kwargs: Any) -> None:
        self.log.append(entry)
        self.trainer.log(entry, **kwargs)

    def _call(self, event: str, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.control = trainer.callback_handler.call_event(event, trainer.args, trainer.state, trainer.control, **kwargs)
        if event == "on_epoch_begin":
            trainer.control.should_epoch_stop = False
