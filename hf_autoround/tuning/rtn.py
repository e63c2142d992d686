# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: neutral tunables. Needs no data."""

from collections.abc import Callable
from math import hypot

import torch

from hf_autoround.layers.sites import QuantizedLayer, oriented
from hf_autoround.numerics import QuantizedTensor, Tunables
from hf_autoround.numerics.grouping import rows_together
from hf_autoround.tuning.task import BlockResult, BlockTask, OnStep, TunableWeight, TuningSettings

_CHUNK = 1 << 19  # elements decided at once: the scratch memory is a few copies of this many floats, and stays in the cache


@torch.no_grad()
def by_rows(weight: TunableWeight, decide: Callable[[TunableWeight], Tunables], chunk: int = _CHUNK) -> QuantizedLayer:
    """Return one parameter under the tunables that `decide` gives for a few of its rows at a time: whole blocks of rows
    where they share scales."""
    values, largest = oriented(weight.parameter, weight.transposed), weight.largest
    if largest is None and weight.data_type.shares_range(weight.spec):
        largest = values.abs().amax((-2, -1), keepdim=True).float()[..., None].expand(*values.shape[:-1], 1, 1)
    together = rows_together(weight.spec.granularity) or 1
    rows = max(1, chunk * values.shape[-2] // values.numel() // together) * together
    ranges = [None] * values.shape[-2] if largest is None else largest.split(rows, dim=-3)
    parts, sizes = [], []
    for portion, its_largest in zip(values.split(rows, dim=-2), ranges, strict=False):
        part = TunableWeight(portion, False, weight.scheme, its_largest)
        parts.append(part.finished(decide(part)))
        sizes.append(portion.float().norm().item())
    size = hypot(*sizes)
    error = hypot(*(part.error * own for part, own in zip(parts, sizes, strict=True))) / size if size else 0.0
    return QuantizedLayer(_join([part.tensor for part in parts]), parts[0].columns, weight.scheme, error, weight.static)


def nearest(weight: TunableWeight) -> QuantizedLayer:
    """Return one parameter rounded to nearest."""
    return by_rows(weight, TunableWeight.neutral)


def round_to_nearest(task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult:
    """Round every weight of the block to nearest."""
    return BlockResult({name: nearest(weight) for name, weight in task.weights.items()})


def _join(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Put rows ([E,] O, G, S) together again."""
    pieces = [part.tensors() for part in parts]
    return QuantizedTensor.of({name: torch.cat([piece[name] for piece in pieces], dim=-3) for name in pieces[0]})
