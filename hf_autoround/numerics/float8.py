# SPDX-License-Identifier: Apache-2.0
"""8-bit floats (e4m3) with a scale for the tensor, each row, group of inputs or block of 128 x 128.

Scales are float32 in files and have the 8 significant bits of bfloat16, so that they are the same in an engine that keeps
them in the model's dtype; the codes are chosen for the rounded scale.

Shapes: ... leading dimensions, O rows, G groups per row, S elements per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_autoround.numerics.base import by_groups, refuse_static
from hf_autoround.numerics.float_grid import E4M3, FloatGrid, FloatTunables, FloatType
from hf_autoround.numerics.grouping import over_rows
from hf_autoround.numerics.quantized import QuantizedTensor
from hf_autoround.numerics.rounding import round_to_bfloat16
from hf_autoround.scheme import ActivationSpec, PerBlock, PerTensor, TensorSpec

_LEAST = 1 / (448 * 512)  # a group of zeros still needs a scale
_FACTORS = tuple(1 + step / 8 for step in range(1, 8))  # what the largest falls on: between two powers of two


class Float8(FloatType):
    """The data type `fp`."""

    name = "fp"

    def grid(self, spec: TensorSpec) -> FloatGrid:
        """Return the numbers that elements can be."""
        return E4M3

    def effective_scale(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """Return the scales as they are stored, none of them zero."""
        return round_to_bfloat16(scale.clamp(min=_LEAST))

    def refuse(self, spec: TensorSpec, columns: int | None) -> str | None:
        """Return why there are no such weights, or None."""
        if spec.bits != 8:
            return f"{self.name} has 8 bits, not {spec.bits}"
        return super().refuse(spec, columns)

    def refuse_inputs(self, spec: ActivationSpec, columns: int | None) -> str | None:
        """Return why inputs cannot be quantized so, or None."""
        return self.refuse(spec, columns) or refuse_static(spec)

    def neutral(self, groups: Tensor, spec: TensorSpec, largest: Tensor | None = None) -> FloatTunables:
        """Return the tunables of round to nearest: the largest |w| falls on 448."""
        return self._tunables(groups, self._start(groups, spec, largest))

    def _start(self, groups: Tensor, spec: TensorSpec, largest: Tensor | None) -> Tensor:
        if largest is None or not isinstance(spec.granularity, PerTensor):
            largest = groups.abs().amax(-1, keepdim=True)
            largest = over_rows(largest, spec.granularity, lambda rows: rows.amax(-3, keepdim=True))
        return largest / E4M3.largest

    def searched_range(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor) -> Tensor:
        """Return the range of least weighted squared error for one scale for a whole tensor, ([E,] O, 1, 1)."""
        if not isinstance(spec.granularity, PerTensor):
            return largest
        return self._searched(groups, spec, importance, largest) * E4M3.largest

    def search(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None) -> FloatTunables:
        """Return the tunables with the scale of least weighted squared error; that of a whole tensor follows from `largest`."""
        if isinstance(spec.granularity, PerTensor) and largest is not None:
            return self.neutral(groups, spec, largest)
        return self._tunables(groups, self._searched(groups, spec, importance, largest))

    def _searched(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None) -> Tensor:
        def total(errors: Tensor) -> Tensor:
            return over_rows(errors, spec.granularity, lambda rows: rows.sum(-3, keepdim=True))

        return self._best(groups, spec, self._start(groups, spec, largest), _FACTORS, importance, total)

    def candidates(
        self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None
    ) -> list[FloatTunables]:
        """Return the search's choice: rows that share a scale cannot choose one by one."""
        return [self.search(groups, spec, importance, largest)]

    def quantize(self, groups: Tensor, spec: TensorSpec, tunables: FloatTunables) -> QuantizedTensor:
        """Return the grid values of `groups` (..., G, S) under `tunables`, differentiable in what is learned.

        Rows that share a scale share its multiplier: their mean, so that gradients move all of them alike.
        """
        if isinstance(spec.granularity, PerBlock | PerTensor):
            shared = over_rows(tunables.scale, spec.granularity, lambda rows: rows.mean(-3, keepdim=True))
            tunables = FloatTunables(tunables.start, None, tunables.rounding, shared)
        return super().quantize(groups, spec, tunables)

    def input_scale(self, largest: Tensor, spec: ActivationSpec) -> Tensor:
        """Return the scale for inputs no larger than this."""
        return self.effective_scale(largest.float() / E4M3.largest, spec)

    def quantize_inputs(self, inputs: Tensor, spec: ActivationSpec, static: Tensor | None) -> Tensor:
        """Return the inputs as products see them, computed in their dtype, as compressed-tensors does."""

        def rounded(groups: Tensor) -> Tensor:
            if static is not None:
                scale = static.to(groups.dtype)
            else:
                scale = groups.abs().amax(-1, keepdim=True) / E4M3.largest
                scale = torch.where(scale == 0, torch.finfo(groups.dtype).eps, scale)
            return E4M3.nearest((groups / scale).float()).to(groups.dtype) * scale

        return by_groups(inputs, spec, rounded)
