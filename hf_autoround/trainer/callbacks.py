# SPDX-License-Identifier: Apache-2.0
"""What is shown while a run goes on: a bar with block, loss and time left, and one line per block.

These two are ordinary TrainerCallbacks (one epoch is one block, one step is one iteration).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from hf_autoround.calibration.batches import SampledText

logger = logging.get_logger(__name__)


class RoundingProgress(TrainerCallback):
    """The bar. Blocks that an earlier run finished are passed over at once."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.block = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, disable=None)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.block = kwargs.get("block", self.block)
        if self.bar is not None:
            self.bar.set_description(self.block)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            if kwargs.get("loss") is not None:
                self.bar.set_postfix_str(f"loss {kwargs['loss']:.2e}", refresh=False)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class BlockLines(TrainerCallback):
    """One log line for each block that is done."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "block" in logs:
            with tqdm.external_write_mode(file=sys.stderr):
                logger.info(block_line(logs, kwargs.get("seconds")))
        elif state.is_world_process_zero and logs and "held_out_kl" in logs:
            with tqdm.external_write_mode(file=sys.stderr):
                logger.info(stage_line(logs, kwargs.get("steps"), kwargs.get("seconds")))


@contextmanager
def sampling_bar(args: Any, request: SampledText) -> Iterator[Callable[[int], None]]:
    """Show a bar of the tokens that are sampled, and a line when they are; gives the function that counts them."""
    started = time.time()
    total = request.num * request.seqlen
    with tqdm(total=total, desc="sampling", unit="token", dynamic_ncols=True, disable=args.disable_tqdm or None) as bar:
        yield lambda tokens: bar.update(tokens) and None
    logger.info(f"{request}: {time.time() - started:.1f} s")


def block_line(logs: dict[str, Any], seconds: float | None) -> str:
    """Return "model.layers.7   7 x W4A16   loss 3.1e-04 -> 1.2e-04 at step 183   4.1 s   5.9 GB"."""
    parts = [f"{logs['block']:<18}", logs["layers"]]
    if logs.get("loss_first") is not None:
        parts.append(f"loss {logs['loss_first']:.2e} -> {logs['loss_best']:.2e} at step {logs['best_step']}")
    if "experts" in logs:
        parts.append(logs["experts"])
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
        parts.append(f"{peak_memory() / 1e9:.1f} GB")
    return "   ".join(parts)


def stage_line(logs: dict[str, Any], steps: int | None, seconds: float | None) -> str:
    """Return "end to end   step 50 of 250   KL 4.1e-01 held out, 3.6e-01 in training   12.0 s   5.9 GB"."""
    kl = f"KL {logs['held_out_kl']:.2e} held out"
    if "training_kl" in logs:
        kl += f", {logs['training_kl']:.2e} in training"
    parts = [f"{'end to end':<18}", f"step {logs['end_to_end_step']}" + (f" of {steps}" if steps else ""), kl]
    if seconds is not None:
        parts += [f"{seconds:.1f} s", f"{peak_memory() / 1e9:.1f} GB"]
    return "   ".join(parts)


def peak_memory() -> int:
    """Return the most bytes used so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
