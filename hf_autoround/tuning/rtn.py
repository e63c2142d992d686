# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: neutral tunables. Needs no data."""

from collections.abc import Callable, Iterator, Sequence
from math import hypot

import torch
from torch import Tensor

from hf_autoround.layers.sites import QuantizedLayer, oriented
from hf_autoround.numerics import QuantizedTensor, Tunables
from hf_autoround.numerics.grouping import rows_together
from hf_autoround.tuning.task import BlockResult, BlockTask, OnStep, TunableWeight, TuningSettings

_CHUNK = 1 << 19  # elements decided at once: the scratch memory is a few copies of this many floats, and stays in the cache


def portions(weight: TunableWeight, chunk: int) -> Iterator[TunableWeight]:
    """Yield a parameter a few rows (`chunk` elements) at a time: whole blocks of rows where they share scales."""
    values, largest = oriented(weight.parameter, weight.transposed), weight.largest
    if largest is None and weight.data_type.shares_range(weight.spec):
        largest = values.abs().amax((-2, -1), keepdim=True).float()[..., None].expand(*values.shape[:-1], 1, 1)
    together = rows_together(weight.spec.granularity) or 1
    rows = max(1, chunk * values.shape[-2] // values.numel() // together) * together
    ranges = [None] * values.shape[-2] if largest is None else largest.split(rows, dim=-3)
    for portion, its_largest in zip(values.split(rows, dim=-2), ranges, strict=False):
        yield TunableWeight(portion, False, weight.scheme, its_largest)


def joined_tunables(parts: Sequence[Tunables]) -> Tunables:
    """Put the tunables of a parameter's portions together again."""
    pieces = [part.tensors() for part in parts]
    return parts[0].of({name: torch.cat([piece[name] for piece in pieces], dim=-3) for name in pieces[0]})


@torch.no_grad()
def resumed(weight: TunableWeight, frozen: QuantizedTensor) -> Tunables:
    """Return the tunables that give the numbers that were frozen: see the data type's `resumed`."""
    parts, begin = [], 0
    for portion in portions(weight, _CHUNK):
        rows = portion.parameter.shape[-2]
        its_own = frozen.map(lambda tensor, begin=begin, rows=rows: tensor.narrow(-3, begin, rows))
        parts.append(portion.data_type.resumed(portion.groups(), portion.spec, its_own))
        begin += rows
    return joined_tunables(parts)


@torch.no_grad()
def by_rows(weight: TunableWeight, decide: Callable[[TunableWeight], Tunables], chunk: int = _CHUNK) -> QuantizedLayer:
    """Return one parameter under the tunables that `decide` gives for a few of its rows at a time."""
    parts, sizes = [], []
    for part in portions(weight, chunk):
        parts.append(part.finished(decide(part)))
        sizes.append(_norm(part.parameter))
    return _joined(weight, parts, sizes, dim=-3)


def by_experts(weight: TunableWeight, together: int, decide: Callable[[TunableWeight, slice], QuantizedLayer]) -> QuantizedLayer:
    """Return one parameter as `decide` makes it of some of its experts at a time, or of all of it where it has none."""
    if weight.parameter.ndim < 3:
        return decide(weight, slice(None))
    parts, sizes = [], []
    for begin in range(0, len(weight.parameter), together):
        which = slice(begin, begin + together)
        portion = weight.parameter[which]
        largest = None if weight.largest is None else weight.largest[which]
        parts.append(decide(TunableWeight(portion, weight.transposed, weight.scheme, largest), which))
        sizes.append(_norm(portion))
    return _joined(weight, parts, sizes, dim=0)


def _norm(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)).item()


def nearest(weight: TunableWeight) -> QuantizedLayer:
    """Return one parameter rounded to nearest."""
    return by_rows(weight, TunableWeight.neutral)


def round_to_nearest(task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult:
    """Round every weight of the block to nearest."""
    return BlockResult({name: nearest(weight) for name, weight in task.weights.items()})


def _joined(weight: TunableWeight, parts: list[QuantizedLayer], sizes: list[float], dim: int) -> QuantizedLayer:
    """Put portions ([E,] O, G, S) of a parameter together again; `sizes` are the norms of the float ones."""
    pieces = [part.tensor.tensors() for part in parts]
    tensor = QuantizedTensor.of({name: torch.cat([piece[name] for piece in pieces], dim=dim) for name in pieces[0]})
    size = hypot(*sizes)
    error = hypot(*(part.error * own for part, own in zip(parts, sizes, strict=True))) / size if size else 0.0
    return QuantizedLayer(tensor, parts[0].columns, weight.scheme, error, weight.static)
