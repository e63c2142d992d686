# SPDX-License-Identifier: Apache-2.0
"""Blocks that wait in host memory or in mapped files and visit the device of the products, the next one fetched ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from hf_autoround.tuning.end_to_end import LearnedBlock


class Visits:
    """Opens one of `blocks` at a time on `device`; a second one is on its way while the first is at work."""

    def __init__(self, blocks: Sequence[LearnedBlock], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "fetch-block")
        self.coming: dict[int, Future[LearnedBlock]] = {}

    @contextmanager
    def open(self, place: int, changes: bool) -> Iterator[LearnedBlock]:
        """Give the block on the device; with `changes` its state is written back when the `with` ends.

        Blocks are opened in order, or, when they change, in reverse: that says which comes next.
        """
        arriving = self.coming.pop(place, None) or self.thread.submit(self._fetch, place)
        visitor = arriving.result()
        self._own(visitor)
        self.coming.clear()
        following = place - 1 if changes else place + 1
        if 0 <= following < len(self.blocks):
            self.coming[following] = self.thread.submit(self._fetch, following)
        yield visitor
        if changes:
            for name, tensor in self.blocks[place].state.items():
                tensor.copy_(visitor.state[name])

    def _fetch(self, place: int) -> LearnedBlock:
        block = self.blocks[place]
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            weights = {name: replace(weight, parameter=self._moved(weight.parameter)) for name, weight in block.weights.items()}
            fixed = {name: self._moved(tensor) for name, tensor in block.fixed.items()}
            state = {name: self._moved(tensor) for name, tensor in block.state.items()}
        if self.stream is not None:
            self.stream.synchronize()
        return replace(block, weights=weights, fixed=fixed, state=state)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=True)

    def _own(self, block: LearnedBlock) -> None:
        """Tell the allocator that the stream of the products uses what was allocated on the fetching one."""
        if self.stream is None:
            return
        tensors: list[Mapping[str, Tensor]] = [block.fixed, block.state]
        tensors.append({name: weight.parameter for name, weight in block.weights.items()})
        for tensor in (tensor for group in tensors for tensor in group.values()):
            tensor.record_stream(torch.cuda.current_stream(self.device))
