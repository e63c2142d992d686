# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: neutral tunables. Needs no data."""

from collections.abc import Callable
from math import hypot

import torch
from torch import Tensor

from hf_autoround.layers.sites import QuantizedLayer, oriented
from hf_autoround.numerics import QuantizedTensor, Tunables
from hf_autoround.tuning.task import BlockResult, BlockTask, OnStep, TunableWeight, TuningSettings

_CHUNK = 1 << 21  # elements decided at once: the scratch memory is a few copies of this many floats


@torch.no_grad()
def by_rows(weight: TunableWeight, decide: Callable[[TunableWeight], Tunables], chunk: int = _CHUNK) -> QuantizedLayer:
    """Return one parameter under the tunables that `decide` gives for a few of its rows at a time."""
    values = oriented(weight.parameter, weight.transposed)
    rows = max(1, chunk * values.shape[-2] // values.numel())
    parts, sizes = [], []
    for portion in values.split(rows, dim=-2):
        part = TunableWeight(portion, False, weight.scheme)
        parts.append(part.finished(decide(part)))
        sizes.append(portion.float().norm().item())
    size = hypot(*sizes)
    error = hypot(*(part.error * own for part, own in zip(parts, sizes, strict=True))) / size if size else 0.0
    return QuantizedLayer(_join([part.tensor for part in parts]), parts[0].columns, weight.scheme, error)


def nearest(weight: TunableWeight) -> QuantizedLayer:
    """Return one parameter rounded to nearest."""
    return by_rows(weight, lambda rows: rows.data_type.neutral(rows.groups(), rows.spec))


def round_to_nearest(task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult:
    """Round every weight of the block to nearest."""
    return BlockResult({name: nearest(weight) for name, weight in task.weights.items()})


def _join(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Put rows ([E,] O, G, S) together again."""

    def joined(pick: list[Tensor | None]) -> Tensor | None:
        return None if pick[0] is None else torch.cat([tensor for tensor in pick if tensor is not None], dim=-3)

    elements, scale = joined([part.elements for part in parts]), joined([_plain(part.scale) for part in parts])
    assert elements is not None and scale is not None
    return QuantizedTensor(elements, scale, joined([part.zero_point for part in parts]))


def _plain(scale: Tensor | QuantizedTensor) -> Tensor:
    assert isinstance(scale, Tensor)
    return scale
