# SPDX-License-Identifier: Apache-2.0
"""NVFP4: groups of 16 e2m1 floats, an e4m3 scale for each, and one float32 number that divides all scales of a tensor.

`w = element * scale / divisor`; the divisor brings the largest scale to 448. Layers that engines fuse (q/k/v, gate/up) have
to share it. Inputs have the same form: their divisor comes from calibration, their scales are found at run time.
https://github.com/vllm-project/compressed-tensors

Shapes: ... leading dimensions, O rows, G groups per row, S elements per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_autoround.numerics.base import by_groups
from hf_autoround.numerics.float_grid import E2M1, E4M3, FloatGrid, FloatTunables, FloatType
from hf_autoround.numerics.quantized import QuantizedTensor
from hf_autoround.numerics.rounding import straight_through
from hf_autoround.scheme import ActivationSpec, PerGroup, TensorSpec

_GROUP = 16
_LEAST = 2.0**-9  # the smallest scale that is not zero
_FACTORS = tuple(1 + step / 20 for step in (*range(-9, 0), *range(1, 11)))


class NVFP4(FloatType):
    """The data type `nv_fp`."""

    name = "nv_fp"
    static_input = "input_global_scale"
    shares_with_layers = True

    def grid(self, spec: TensorSpec) -> FloatGrid:
        """Return the numbers that elements can be."""
        return E2M1

    def effective_scale(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """Return the scales in e4m3, none of them zero."""
        return straight_through(scale.clamp(_LEAST, E4M3.largest), E4M3.nearest)

    def refuse(self, spec: TensorSpec, columns: int | None) -> str | None:
        """Return why there are no such weights, or None."""
        if spec.bits != 4:
            return f"{self.name} has 4 bits, not {spec.bits}"
        if spec.granularity != PerGroup(_GROUP):
            return f"{self.name} has groups of {_GROUP}, not group_size={spec.group_size}"
        return super().refuse(spec, columns)

    def refuse_inputs(self, spec: ActivationSpec, columns: int | None) -> str | None:
        """Return why inputs cannot be quantized so, or None."""
        return self.refuse(spec, columns) or (None if spec.dynamic else f"inputs in {self.name} need act_dynamic=True")

    def shares_range(self, spec: TensorSpec) -> bool:
        """Say yes: the divisor belongs to a whole tensor, or to several."""
        return True

    def calibrates_inputs(self, spec: ActivationSpec) -> bool:
        """Say yes: calibration gives the divisor."""
        return True

    def neutral(self, groups: Tensor, spec: TensorSpec, largest: Tensor | None = None) -> FloatTunables:
        """Return the tunables of round to nearest: the largest |w| of each group falls on 6."""
        if largest is None:
            largest = groups.abs().amax((-3, -2, -1), keepdim=True).expand(*groups.shape[:-2], 1, 1)
        divisor = _divisor(largest)
        return self._tunables(groups, groups.abs().amax(-1, keepdim=True) * (1 / E2M1.largest) * divisor, divisor)

    def search(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None) -> FloatTunables:
        """Return the tunables with the scale of least weighted squared error."""
        neutral = self.neutral(groups, spec, largest)
        start = self._best(groups * neutral.divisor, spec, neutral.start, _FACTORS, importance)
        return self._tunables(groups, start, neutral.divisor)

    def candidates(
        self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None
    ) -> list[FloatTunables]:
        """Return the weighted search, the search that weighs all inputs alike, and the range."""
        searches = [self.search(groups, spec, weights, largest) for weights in (importance, None)]
        return [*searches, self.neutral(groups, spec, largest)]

    def freeze(self, quantized: QuantizedTensor, spec: TensorSpec) -> QuantizedTensor:
        """Return what ships: one-byte elements (without -0) and scales."""
        frozen = quantized.frozen(torch.float8_e4m3fn, torch.float8_e4m3fn)
        return QuantizedTensor((quantized.elements.detach() + 0.0).to(torch.float8_e4m3fn), frozen.scale, divisor=frozen.divisor)

    def input_scale(self, largest: Tensor, spec: ActivationSpec) -> Tensor:
        """Return the divisor for inputs no larger than this."""
        return _divisor(largest)

    def quantize_inputs(self, inputs: Tensor, spec: ActivationSpec, static: Tensor | None) -> Tensor:
        """Return the inputs as products see them. As in compressed-tensors a group's largest is divided in the inputs' dtype,
        the rest is float32."""
        assert static is not None

        def rounded(groups: Tensor) -> Tensor:
            largest = groups.abs().amax(-1, keepdim=True)
            scale = E4M3.nearest((largest / E2M1.largest).float() * static)
            scale = torch.where(scale == 0, 0.125, scale) / static
            return (E2M1.nearest(groups.float() / scale) * scale).to(groups.dtype)

        return by_groups(inputs, spec, rounded)


def _divisor(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, E4M3.largest * E2M1.largest / largest.float(), 1.0)
