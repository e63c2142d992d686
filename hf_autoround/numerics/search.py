# SPDX-License-Identifier: Apache-2.0
"""The scale of least weighted error: the first half of optimized round to nearest, and the start of tuning.

For each group: try multiples of the range's scale, both signs where the grid is lopsided, then alternate between the
codes for a scale and the least-squares scale for the codes. A closed-form refinement finds in a dozen candidates what a
fine grid needs two hundred for.

Shapes: ... leading dimensions, G groups per row, S elements per group.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 1.08, 1.16)
REFINEMENTS = 4
CHUNK = 1 << 23  # elements searched at once: bounds the scratch memory to a few copies of this many floats


@torch.no_grad()
def best_of_grid(
    groups: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    importance: Tensor | None,
    effective_scale: Callable[[Tensor], Tensor],
    signs: tuple[float, ...] = (1.0, -1.0),
) -> tuple[Tensor, Tensor | None]:
    """Return the best scale and zero point, (..., G, 1) each, on the integer grid low..high.

    `scale` and `zero_point` are round to nearest's; the result's weighted error is never above theirs.
    `importance` is (..., G, S) or broadcastable. `signs` are tried where the grid is lopsided (no zero point).
    """
    weight = torch.ones((), device=groups.device) if importance is None else importance
    flat = [groups.flatten(0, -3), scale.flatten(0, -3)]
    flat.append(weight.broadcast_to(groups.shape).flatten(0, -3))
    rows = max(1, CHUNK // max(1, flat[0][0].numel()))
    zeros = [None] * len(flat[0]) if zero_point is None else zero_point.flatten(0, -3).split(rows)
    chunks = zip(*(part.split(rows) for part in flat), zeros, strict=False)
    parts = [_best(*chunk, low, high, effective_scale, signs) for chunk in chunks]
    best_scale = torch.cat([part[0] for part in parts]).view(scale.shape)
    return best_scale, None if zero_point is None else torch.cat([part[1] for part in parts]).view(scale.shape)


def _best(
    groups: Tensor,
    scale: Tensor,
    weight: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    effective_scale: Callable[[Tensor], Tensor],
    signs: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Search one chunk of rows."""
    lopsided = zero_point is None
    start_zero = torch.zeros_like(scale) if zero_point is None else zero_point

    def candidate(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = effective_scale(scale)
        codes = torch.div(groups, scale).round_().add_(zero).clamp_(low, high).sub_(zero)
        error = torch.mul(codes, scale).sub_(groups).square_().mul_(weight).sum(-1, keepdim=True)
        return scale, zero, error, codes

    def keep(best, other):  # noqa: ANN001, ANN202
        better = other[2] < best[2]
        return tuple(torch.where(better, new, old) for new, old in zip(other[:3], best[:3], strict=True))

    lowest = groups.amin(-1, keepdim=True).clamp(max=0)
    best = candidate(scale, start_zero)[:3]
    for ratio in RATIOS:
        for sign in signs if lopsided else (1.0,):
            zeros = [start_zero]
            if not lopsided:  # a smaller range is cut at one end, at both, or moved by a step
                cut = torch.div(lowest, -effective_scale(scale * ratio))
                zeros = [cut, *(cut * ratio + step for step in (-1, 0, 1))]
            for zero in zeros:
                best = keep(best, candidate(scale * (ratio * sign), zero.round().clamp(min(low, 0), high)))
    for _ in range(REFINEMENTS):
        codes = candidate(best[0], best[1])[3]
        weighted = codes * weight
        squares = (weighted * codes).sum(-1, keepdim=True)
        least_squares = (weighted * groups).sum(-1, keepdim=True) / squares.clamp(min=1e-30)
        best = keep(best, candidate(torch.where(squares > 0, least_squares, best[0]), best[1]))
    return best[0], best[1]
