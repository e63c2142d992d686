# SPDX-License-Identifier: Apache-2.0
"""Blocks that wait in host memory or in mapped files and visit the device of the products.

Three of them are on the device at most: one at work, the next one on its way there, and one that was changed on its way
back. Copies go through page-locked memory, which a GPU reads and writes by itself, and leave the stream of the products alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_autoround.tuning.end_to_end import LearnedBlock


@dataclass(frozen=True)
class _Coming:
    """A block on its way to the device; the moments of its Adam too if it is `whole`."""

    place: int
    whole: bool
    block: Future[LearnedBlock]


class Visits:
    """Opens one of `blocks` at a time on `device`: in order, or, when they change, in reverse."""

    def __init__(self, blocks: Sequence[LearnedBlock], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.fetching, self.returning = (ThreadPoolExecutor(1, f"{what}-block") for what in ("fetch", "return"))
        self.inward, self.outward = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self.coming: _Coming | None = None
        self.leaving: Future[None] | None = None
        self.done: torch.cuda.Event | None = None

    @contextmanager
    def open(self, place: int, changes: bool) -> Iterator[LearnedBlock]:
        """Give the block on the device; with `changes` its state is written back after the `with`."""
        arriving, last = self.coming, len(self.blocks) - 1
        if arriving is None or arriving.place != place or (changes and not arriving.whole):
            arriving = self._fetched(place, changes or place == last, self.leaving)
        self.coming = None  # what came in vain goes
        visitor = arriving.block.result()
        self._own(visitor)
        if changes and place > 0:
            self.coming = self._fetched(place - 1, True)
        elif not changes:  # the last one is opened again, to be changed
            self.coming = arriving if place == last else self._fetched(place + 1, place + 1 == last)
        yield visitor
        self.done = self._mark()
        if changes:
            self.settle()
            self.leaving = self.returning.submit(self._return, place, visitor, self.done)
            if place == 0:
                self.coming = self._fetched(0, last == 0, self.leaving)

    def settle(self) -> None:
        """Wait until what was changed is back."""
        if self.leaving is not None:
            self.leaving.result()

    def _fetched(self, place: int, whole: bool, after: Future[None] | None = None) -> _Coming:
        return _Coming(place, whole, self.fetching.submit(self._fetch, place, whole, after, self.done))

    def _fetch(self, place: int, whole: bool, after: Future[None] | None, done: torch.cuda.Event | None) -> LearnedBlock:
        if after is not None:
            after.result()
        if done is not None:  # the program runs ahead of the device: a block that was closed may be at work still
            done.synchronize()
        block = self.blocks[place]
        learned = {f"{name}:{part}" for name in block.weights for part in block.tunables(name).tensors()}
        wanted = set(block.state) if whole else learned | {f"{name}:norm" for name in block.norms}
        with nullcontext() if self.inward is None else torch.cuda.stream(self.inward):
            weights = {name: replace(weight, parameter=self._moved(weight.parameter)) for name, weight in block.weights.items()}
            fixed = {name: self._moved(tensor) for name, tensor in block.fixed.items()}
            state = {name: self._moved(tensor) for name, tensor in block.state.items() if name in wanted}
        if self.inward is not None:
            self.inward.synchronize()
        return replace(block, weights=weights, fixed=fixed, state=state)

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.inward is None:
            return tensor.to(self.device, copy=True)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _return(self, place: int, visitor: LearnedBlock, moved: torch.cuda.Event | None) -> None:
        if self.outward is not None and moved is not None:
            self.outward.wait_event(moved)
        for name, tensor in self.blocks[place].state.items():
            if self.outward is None:
                tensor.copy_(visitor.state[name])
                continue
            locked = tensor if tensor.is_pinned() else torch.empty_like(tensor, pin_memory=True)
            with torch.cuda.stream(self.outward):
                locked.copy_(visitor.state[name], non_blocking=True)
            self.outward.synchronize()
            if locked is not tensor:
                tensor.copy_(locked)

    def _mark(self) -> torch.cuda.Event | None:
        """Return what tells that the products so far are done."""
        return None if self.outward is None else torch.cuda.current_stream(self.device).record_event()

    def _own(self, block: LearnedBlock) -> None:
        """Tell the allocator that the stream of the products uses what was allocated on the inward one."""
        if self.inward is None:
            return
        tensors: list[Mapping[str, Tensor]] = [block.fixed, block.state]
        tensors.append({name: weight.parameter for name, weight in block.weights.items()})
        for tensor in (tensor for group in tensors for tensor in group.values()):
            tensor.record_stream(torch.cuda.current_stream(self.device))
