# SPDX-License-Identifier: Apache-2.0
"""Symmetric and asymmetric integers of 2 to 8 bits.

The symmetric grid uses all 2^b codes, -2^(b-1) to 2^(b-1) - 1: the scale's sign is chosen so that the largest |w| falls
on -2^(b-1), which has no positive twin. The asymmetric grid is 0 to 2^b - 1 with an integer zero point.
The formulas are those of SignRound (https://arxiv.org/abs/2309.05516) and of the formats its checkpoints use.

Shapes: ... leading dimensions, G groups per row, S elements per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.numerics.base import DataType, by_groups, refuse_ragged, refuse_static
from hf_autoround.numerics.quantized import QuantizedTensor, dequantize
from hf_autoround.numerics.rounding import round_to_bfloat16, straight_through, within
from hf_autoround.numerics.search import best_of_grid
from hf_autoround.numerics.tunables import Tunables, learned
from hf_autoround.scheme import ActivationSpec, PerBlock, PerTensor, TensorSpec

SMALLEST_SCALE = 1e-5  # a group of zeros still needs a scale that float16 can hold


@dataclass(frozen=True)
class IntegerTunables(Tunables):
    """`rounding` (..., G, S) is added before rounding, in steps of the grid; `scale` (..., G, 1) multiplies `start`.

    `start` (..., G, 1) is the signed scale that the range or the search gave, `zero_point` (..., G, 1) whole numbers or
    None for symmetric grids; neither is learned.
    """

    start: Tensor
    zero_point: Tensor | None
    rounding: Tensor = learned("rounding")
    scale: Tensor = learned("range")

    def clamp_(self) -> None:
        """Keep the scale's multiplier between 0 and 2, and rounding within half a step of the grid."""
        self.scale.clamp_(0.0, 2.0)
        self.rounding.clamp_(-0.5, 0.5)


class Integer(DataType):
    """The data type `int`."""

    name = "int"
    tunables = IntegerTunables

    def refuse(self, spec: TensorSpec, columns: int | None) -> str | None:
        """Return why there are no such weights, or None: integers have any number of inputs."""
        if isinstance(spec.granularity, PerTensor | PerBlock):
            return f"integers have a scale for each row or group of inputs, not group_size={spec.group_size}"
        return None

    def refuse_inputs(self, spec: ActivationSpec, columns: int | None) -> str | None:
        """Return why inputs cannot be quantized so, or None."""
        return refuse_static(spec) or refuse_ragged(spec, columns, may_be_short=True)

    def neutral(self, groups: Tensor, spec: TensorSpec, largest: Tensor | None = None) -> IntegerTunables:
        """Return the tunables of round to nearest: the scale covers the range of each group (..., G, S)."""
        low = groups.amin(-1, keepdim=True).clamp(max=0)
        high = groups.amax(-1, keepdim=True).clamp(min=0)
        if spec.symmetric:
            start = torch.where(high < -low, -low, -high) / 2 ** (spec.bits - 1)
            return _tunables(groups, start, None)
        levels = 2**spec.bits - 1
        # in bfloat16, as other tools compute it from bfloat16 weights: the scale is then exact in a bfloat16 kernel too
        start = round_to_bfloat16(round_to_bfloat16(high - low) / levels)
        zero_point = (-low / effective_scale(start)).round().clamp(0, levels)
        return _tunables(groups, start, zero_point)

    def search(
        self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None
    ) -> IntegerTunables:
        """Return the tunables with the scale (and zero point) of least weighted squared error."""
        return self._searched(groups, spec, importance, signs=(1.0, -1.0))

    def candidates(
        self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None
    ) -> list[IntegerTunables]:
        """Return tunables among which each group may choose by the layer's own output, likeliest first.

        The weighted search with the scale's sign kept and free, the search that weighs all inputs alike, and the range.
        """
        found = [self._searched(groups, spec, importance, signs=(1.0,))]
        if spec.symmetric:
            found.append(self.search(groups, spec, importance))
        return [*found, self._searched(groups, spec, None, signs=(1.0,)), self.neutral(groups, spec)]

    def with_scales(self, groups: Tensor, spec: TensorSpec, frozen: QuantizedTensor) -> IntegerTunables:
        """Return the tunables that round `groups` to nearest with the scales of numbers that were frozen."""
        zero_point = None if frozen.zero_point is None else frozen.zero_point.float()
        return _tunables(groups, dequantize(frozen.scale), zero_point)

    def steps(self, groups: Tensor, aims: Tensor, spec: TensorSpec, tunables: IntegerTunables) -> Tensor:
        """Return how far from `groups` the values `aims` are, in steps of the grid."""
        return (aims - groups) / effective_scale(tunables.start * tunables.scale)

    def _searched(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, signs: tuple[float, ...]) -> IntegerTunables:
        neutral = self.neutral(groups, spec)
        low, high = grid(spec)
        start, zero_point = best_of_grid(
            groups, effective_scale(neutral.start), neutral.zero_point, low, high, importance, effective_scale, signs
        )
        return _tunables(groups, start, zero_point)

    def range_rate(self, spec: TensorSpec) -> float:
        """Return how far a scale should move for each step of the rounding, relative to its size.

        2 over the largest code: then a step moves the outermost weights equally far at any width. (tinystories, KL to the
        float model: 0.0347 against 0.038 at 4 bits, where the plain rate moves them four steps of the grid.)
        """
        return 2.0 ** (2 - spec.bits)

    def quantize(self, groups: Tensor, spec: TensorSpec, tunables: IntegerTunables) -> QuantizedTensor:
        """Return the grid values of `groups` (..., G, S) under `tunables`, differentiable in what is learned."""
        # as every int4 kernel reads it: rounding the scale *before* dividing makes the trained codes and the kernel's
        # arithmetic agree to the last bit
        scale = effective_scale(tunables.start * tunables.scale)
        low, high = grid(spec)
        elements = _ToGrid.apply(groups, scale, tunables.rounding, tunables.zero_point, low, high)
        return QuantizedTensor(elements, scale, tunables.zero_point)

    def freeze(self, quantized: QuantizedTensor, spec: TensorSpec) -> QuantizedTensor:
        """Return what ships: 8-bit codes (signed when symmetric), float16 scales."""
        return quantized.frozen(torch.int8 if spec.symmetric else torch.uint8, torch.float16)

    def input_scale(self, largest: Tensor, spec: ActivationSpec) -> Tensor:
        """Return the scale for inputs no larger than this."""
        return (largest.float() / _half_range(spec)).clamp(min=torch.finfo(torch.float32).eps)

    def quantize_inputs(self, inputs: Tensor, spec: ActivationSpec, static: Tensor | None) -> Tensor:
        """Return the inputs as products see them, computed in their dtype.

        Symmetric inputs reach half a step beyond the largest code, so that the range is used evenly: what
        compressed-tensors does. https://github.com/vllm-project/compressed-tensors
        """
        half = 2 ** (spec.bits - 1)

        def rounded(groups: Tensor) -> Tensor:
            if static is not None:
                scale, zero = static.to(groups.dtype), 0
            elif spec.symmetric:
                scale, zero = _not_zero(groups.abs().amax(-1, keepdim=True) / _half_range(spec)), 0
            else:
                low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
                scale = (high - low) / (2 * half - 1)
                zero = torch.where(scale == 0, -half, (-half - low / scale).clamp(-half, half - 1).round())
                scale = _not_zero(scale)
            return ((groups / scale + zero).clamp(-half, half - 1).round() - zero) * scale

        return by_groups(inputs, spec, rounded)


def _half_range(spec: TensorSpec) -> float:
    return (2**spec.bits - 1) / 2


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def grid(spec: TensorSpec) -> tuple[int, int]:
    """Return the smallest and the largest code."""
    half = 2 ** (spec.bits - 1)
    return (-half, half - 1) if spec.symmetric else (0, 2 * half - 1)


def effective_scale(scale: Tensor) -> Tensor:
    """Return the scale as it is stored and served: exact in float16 and in bfloat16, no nearer to zero than SMALLEST_SCALE;
    float32, signed. The gradient passes straight through, at that floor too.

    Formats store float16, and engines that run a model in bfloat16 round that again: weights would move by 1.5e-3.
    """
    return straight_through(scale, _stored_scale)


def _stored_scale(scale: Tensor) -> Tensor:
    rounded = scale.bfloat16().half().float()
    floor = torch.where(rounded < 0, -SMALLEST_SCALE, SMALLEST_SCALE).half().float()
    return torch.where(rounded.abs() < SMALLEST_SCALE, floor, rounded)


def _tunables(groups: Tensor, start: Tensor, zero_point: Tensor | None) -> IntegerTunables:
    return IntegerTunables(start, zero_point, rounding=torch.zeros_like(groups), scale=torch.ones_like(start))


class _ToGrid(torch.autograd.Function):
    """clamp(round(w / s + v) + z) with the gradient passed straight through the rounding.

    Written by hand because autograd would keep four tensors of the weight's size where two do: the step is bound by
    memory traffic.
    """

    @staticmethod
    def forward(ctx, groups, scale, rounding, zero_point, low, high):  # noqa: ANN001, ANN205
        codes = torch.div(groups, scale).add_(rounding).round_()
        if zero_point is not None:
            codes.add_(zero_point)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(groups, scale, within(codes, low, high))
        return codes.clamp_(low, high)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        groups, scale, inside = ctx.saved_tensors
        for_rounding = inside.to(gradient.dtype).mul_(gradient)
        for_scale = None
        if ctx.needs_input_grad[1]:
            for_scale = (for_rounding * groups).sum(-1, keepdim=True).neg_().div_(scale * scale)
        return None, for_scale, for_rounding, None, None, None
