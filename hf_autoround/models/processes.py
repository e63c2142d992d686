# SPDX-License-Identifier: Apache-2.0
"""The processes that share a run: one, or as many as torchrun (or accelerate launch) started.

Each has the whole block and its own share of the samples; what has to be known of all samples is summed or gathered. The
main process alone touches the output folder. Starting processes, devices and the process group are accelerate's.

An error must not leave the others waiting: they learn of it where they meet next, in `together`, `gather` or `from_main`.
A process that dies is noticed by the launcher, which ends the others.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, distributed

from hf_autoround.errors import AutoRoundError

# the others wait while the main process writes the checkpoint, which takes longer than the ten minutes that NCCL allows
_PATIENCE = timedelta(hours=2)
_T = TypeVar("_T")


class FailedElsewhere(AutoRoundError):
    """Another process failed; the message is its own."""


@dataclass(frozen=True)
class _Failure:
    message: str


@dataclass(frozen=True)
class Processes:
    """This process' number, how many there are, and the device that is its own (None: it is alone and may choose)."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        """Say whether this is the process that writes and speaks."""
        return self.index == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of every process' tensor, the same bits in each of them."""
        return tensor if self.device is None else reduce(tensor.to(self.device), "sum").to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Say whether one of the processes says yes."""
        return flag if self.device is None else bool(self.total(torch.tensor(int(flag))).item())

    def gather(self, value: _T) -> list[_T]:
        """Return every process' value, in order. Tensors have to be on the CPU.

        Raises FailedElsewhere if one of them has left a `together` with an error.
        """
        if self.device is None:
            return [value]
        values = gather_object([value])
        for other in values:
            if isinstance(other, _Failure):
                raise FailedElsewhere(other.message)
        return values

    def from_main(self, read: Callable[[], _T]) -> _T:
        """Call `read` in the main process alone and return its result, or raise its AutoRoundError, in all of them."""
        if self.device is None:
            return read()
        outcome: list[Any] = [None]
        try:
            if self.main:
                outcome = [read()]
        except AutoRoundError as error:
            broadcast_object_list([_Failure(str(error))])
            raise
        result = broadcast_object_list(outcome)[0]
        if isinstance(result, _Failure):
            raise FailedElsewhere(result.message)
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the `with` together: an AutoRoundError of one process is raised in all of them.

        Inside of it only `gather` may be used, and no other `together`.
        """
        try:
            yield
        except FailedElsewhere:
            raise
        except AutoRoundError as error:
            if self.device is not None:
                gather_object([_Failure(str(error))])
            raise
        self.gather(None)


def join(cpu: bool = False) -> Processes:
    """Join the processes that a launcher started; `cpu`: they work on the CPU whatever else there is.

    Raises AutoRoundError if they cannot work together.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    joined = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if started == 1 and not joined:
        return Processes()
    local_index = int(os.environ.get("LOCAL_RANK", "0"))
    cpu = cpu or not torch.accelerator.is_available()
    if not cpu and 1 < torch.accelerator.device_count() <= local_index:  # 1: perhaps each sees only its own
        raise AutoRoundError(
            f"process {local_index} of this machine has no device, there are {torch.accelerator.device_count()}: "
            "start as many processes as there are devices"
        )
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    if state.num_processes < started:  # no process group for this kind of device: each would do all the work
        raise AutoRoundError(
            f"{started} processes were started, but processes cannot share work on {state.device.type} devices; "
            "start one, or use device_map cpu"
        )
    if not joined and state.backend == "gloo":  # whose threads may abort a process that exits without a farewell
        atexit.register(leave)
    return Processes(state.process_index, state.num_processes, local_index, state.device)


def leave() -> None:
    """End the process group, if there is one; to be called by all processes when they are done."""
    if distributed.is_available() and distributed.is_initialized():
        PartialState().destroy_process_group()
