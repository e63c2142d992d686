# SPDX-License-Identifier: Apache-2.0
"""Grids of small floating-point numbers, and what the data types on them have in common.

Shapes: ... leading dimensions, O rows, G groups per row, S elements per group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.numerics.base import DataType, refuse_ragged
from hf_autoround.numerics.quantized import QuantizedTensor, dequantize
from hf_autoround.numerics.rounding import power_of_two_below, within
from hf_autoround.numerics.search import CHUNK
from hf_autoround.numerics.tunables import Tunables, learned
from hf_autoround.scheme import TensorSpec


@dataclass(frozen=True)
class FloatGrid:
    """Both signs of (1 + m / 2^mantissa) 2^e up to `largest`; from e = `smallest` downwards the spacing stays."""

    mantissa: int
    smallest: int
    largest: float

    @property
    def top(self) -> float:
        """The power of two below the largest number."""
        return power_of_two_below(torch.tensor(self.largest)).item()

    def step(self, values: Tensor) -> Tensor:
        """Return the distance between grid numbers around float32 values."""
        power = power_of_two_below(values.clamp(-self.largest, self.largest))
        return power.clamp_(min=2.0**self.smallest).mul_(2.0**-self.mantissa)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the nearest grid numbers, ties to even; small negative values become -0."""
        step = self.step(values)
        return torch.div(values.clamp(-self.largest, self.largest), step).round_().mul_(step)


E2M1 = FloatGrid(1, 0, 6.0)
E4M3 = FloatGrid(3, -6, 448.0)
QUARTERS = FloatGrid(2, 0, 1.75)  # the integers of 4 bits, sign and magnitude, as MXINT4 scales them


@dataclass(frozen=True)
class FloatTunables(Tunables):
    """`rounding` (..., G, S) is added before rounding, in steps of the grid there; `scale` (..., G, 1) multiplies `start`.

    `start` (..., G, 1) is the scale that the range or the search gave, `divisor` (..., 1, 1) divides all scales of a row, if
    there is one; neither is learned. `scale` is None where a scale cannot move: powers of two.
    """

    start: Tensor
    divisor: Tensor | None
    rounding: Tensor = learned("rounding")
    scale: Tensor | None = learned("range")

    def learned(self) -> dict[str, Tensor]:
        """Return the learned tensors by field name."""
        return {name: tensor for name, tensor in super().learned().items() if tensor is not None}

    def clamp_(self) -> None:
        """Keep the scale's multiplier between 0 and 2, and rounding within half a step of the grid."""
        if self.scale is not None:
            self.scale.clamp_(0.0, 2.0)
        self.rounding.clamp_(-0.5, 0.5)


class FloatType(DataType):
    """A data type of symmetric floats: subclasses say which grid, which scales there are and where they begin."""

    tunables: type[Tunables] = FloatTunables
    moves_scales = True  # whether tuning does

    @abstractmethod
    def grid(self, spec: TensorSpec) -> FloatGrid:
        """Return the numbers that elements can be."""
        ...

    @abstractmethod
    def effective_scale(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """Return scales as they are stored, float32; the gradient passes straight through."""
        ...

    def range_rate(self, spec: TensorSpec) -> float:
        """Return a tenth of the rate at which a step of the scale moves the outermost weights as far as one of the rounding.

        These grids lie nearly as well under any scale, so that a scale which moves fast brings noise and little else
        (tinystories, NVFP4, blocks tuned, KL to the float model: 0.1025, at the whole rate 0.1071).
        """
        grid = self.grid(spec)
        return 0.1 * grid.step(torch.tensor(grid.largest)).item() / grid.largest

    def refuse(self, spec: TensorSpec, columns: int | None) -> str | None:
        """Return why there are no such weights, or None."""
        if not spec.symmetric:
            return f"{spec.data_type} has no zero points (sym=False)"
        return refuse_ragged(spec, columns, may_be_short=spec.bits == 8 and spec.data_type == "fp")

    def with_scales(self, groups: Tensor, spec: TensorSpec, frozen: QuantizedTensor) -> FloatTunables:
        """Return the tunables that round `groups` to nearest with the scales of numbers that were frozen."""
        return self._tunables(groups, dequantize(frozen.scale), frozen.divisor)

    def steps(self, groups: Tensor, aims: Tensor, spec: TensorSpec, tunables: FloatTunables) -> Tensor:
        """Return how far from `groups` the values `aims` are, in steps that the grid has at `groups`."""
        _, whole = self._scales(spec, tunables)
        return (aims - groups) / (whole * self.grid(spec).step(groups / whole))

    def quantize(self, groups: Tensor, spec: TensorSpec, tunables: FloatTunables) -> QuantizedTensor:
        """Return the grid values of `groups` (..., G, S) under `tunables`, differentiable in what is learned."""
        scale, whole = self._scales(spec, tunables)
        elements = _ToGrid.apply(groups, whole, tunables.rounding, self.grid(spec))
        return QuantizedTensor(elements, scale, divisor=tunables.divisor)

    def _scales(self, spec: TensorSpec, tunables: FloatTunables) -> tuple[Tensor, Tensor]:
        """Return the scales as they are stored, and what an element is multiplied with."""
        scale = self.effective_scale(tunables.start if tunables.scale is None else tunables.start * tunables.scale, spec)
        return scale, scale if tunables.divisor is None else scale * (1 / tunables.divisor)

    def freeze(self, quantized: QuantizedTensor, spec: TensorSpec) -> QuantizedTensor:
        """Return what ships: elements of a byte, which holds every grid here; float32 scales."""
        return quantized.frozen(torch.float8_e4m3fn, torch.float32)

    def _tunables(self, groups: Tensor, start: Tensor, divisor: Tensor | None = None) -> FloatTunables:
        scale = torch.ones_like(start) if self.moves_scales else None
        return FloatTunables(start, divisor, rounding=torch.zeros_like(groups), scale=scale)

    def _best(
        self,
        groups: Tensor,
        spec: TensorSpec,
        start: Tensor,
        factors: Iterable[float],
        importance: Tensor | None,
        total: Callable[[Tensor], Tensor] = lambda errors: errors,
    ) -> Tensor:
        """Return the best of `start` (..., O, G, 1) and its multiples, by weighted squared error; `total` adds up the errors
        of what shares a scale."""
        grid, weight = self.grid(spec), torch.ones((), device=groups.device) if importance is None else importance
        rows = max(1, CHUNK * groups.shape[-3] // max(1, groups.numel()))
        parts = groups.split(rows, -3), weight.expand_as(groups).split(rows, -3)

        def error(scale: Tensor) -> Tensor:
            errors = []
            for part, its_weight, stored in zip(*parts, self.effective_scale(scale, spec).split(rows, -3), strict=True):
                values = grid.nearest(torch.div(part, stored)).mul_(stored)
                errors.append(values.sub_(part).square_().mul_(its_weight).sum(-1, keepdim=True))
            return total(torch.cat(errors, -3))

        best, least = start, error(start)
        for factor in factors:
            scale = start * factor
            found = error(scale)
            better = found < least
            best, least = torch.where(better, scale, best), torch.where(better, found, least)
        return best


class _ToGrid(torch.autograd.Function):
    """nearest(w (1 / s) + v step) with the gradient passed straight through the rounding."""

    @staticmethod
    def forward(ctx, groups, scale, rounding, grid):  # noqa: ANN001, ANN205
        # times the reciprocal, as auto-round does it: weights in bfloat16 lie half way between two numbers now and then
        values = torch.mul(groups, scale.reciprocal())
        step = grid.step(values)
        moved = torch.addcmul(values, rounding, step)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(groups, scale, step.mul_(within(moved, -grid.largest, grid.largest)))
        return grid.nearest(moved)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        groups, scale, step = ctx.saved_tensors
        for_scale = None
        if ctx.needs_input_grad[1]:
            for_scale = (gradient * groups).mul_(step.sign()).sum(-1, keepdim=True).neg_().div_(scale * scale)
        return None, for_scale, gradient * step, None
