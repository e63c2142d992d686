# SPDX-License-Identifier: Apache-2.0
"""Which samples are tuned on, which choose the best step, and in which order they come: functions of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def split(samples: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the samples to tune on and those to choose the best step on: `count` of them, an eighth at the most, spread
    evenly. A handful of samples is too few to hold any out: then both are all of them."""
    every = torch.arange(samples)
    count = min(count, samples // 8)
    if count == 0:
        return every, every
    held_out = torch.arange(count) * samples // count
    return every[~torch.isin(every, held_out)], held_out


def batches(samples: Tensor, seed: int, batch_size: int, accumulate: int = 1) -> Iterator[list[Tensor]]:
    """Yield the micro-batches of each step for ever: shuffled passes over the samples, a function of the seed.

    A step takes its samples from all over the set, as evenly as it goes: one from every batch_size, in turn. Samples are
    shared out by the same batches, so each share has as much to do in every step.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(len(samples), batch_size * accumulate)
    micro = max(1, min(batch_size, size))
    while True:
        order = _in_turn(samples[torch.randperm(len(samples), generator=generator)], batch_size, size)
        for start in range(0, len(order) - size + 1, size):
            yield list(order[start : start + size].split(micro))


def _in_turn(shuffled: Tensor, batch_size: int, size: int) -> Tensor:
    """Return the samples ordered so that any `size` in a row come from different batches, numbered modulo `size`."""
    stratum = shuffled // batch_size % size
    turn = torch.zeros_like(stratum)
    for each in stratum.unique():
        members = stratum == each
        turn[members] = torch.arange(int(members.sum()))
    return shuffled[torch.argsort(turn * size + stratum)]
