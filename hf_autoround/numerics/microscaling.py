# SPDX-License-Identifier: Apache-2.0
"""Microscaling formats: groups of 32 small floats (or 4-bit integers) with a power of two as their scale.

https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf. A weight's exponent is free, as it is
stored: round to nearest takes that of the largest |w| (which may clip it), the search the best of three. Inputs get theirs
at run time by a rule that engines have: "even", as compressed-tensors and vLLM, rounds up from 1.75 times a power of two
on; "ceil" clips nothing. At 8 bits the two are the same.

Shapes: ... leading dimensions, G groups per row, S elements per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hf_autoround.numerics.base import by_groups
from hf_autoround.numerics.float_grid import E2M1, E4M3, QUARTERS, FloatGrid, FloatTunables, FloatType
from hf_autoround.numerics.rounding import power_of_two_below
from hf_autoround.scheme import ActivationSpec, PerGroup, TensorSpec

_GROUP = 32
_LEAST, _MOST = 2.0**-126, 2.0**127  # of scales: what has ordinary float32 numbers


class Microscaling(FloatType):
    """The data types `mx_fp` (4 and 8 bits), `mx_fp_rceil` and `mx_int` (4 bits)."""

    moves_scales = False

    def __init__(self, name: str, grids: Mapping[int, FloatGrid], exponent: Literal["even", "ceil"] = "even") -> None:
        self.name, self.grids, self.exponent = name, grids, exponent

    def grid(self, spec: TensorSpec) -> FloatGrid:
        """Return the numbers that elements can be."""
        return self.grids[spec.bits]

    def effective_scale(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """Return the scales: powers of two all of them, none too large or too small to be stored."""
        return scale.clamp(_LEAST, _MOST)

    def refuse(self, spec: TensorSpec, columns: int | None) -> str | None:
        """Return why there are no such weights, or None."""
        if spec.bits not in self.grids:
            return f"{self.name} has {' or '.join(map(str, self.grids))} bits, not {spec.bits}"
        if spec.granularity != PerGroup(_GROUP):
            return f"{self.name} has groups of {_GROUP}, not group_size={spec.group_size}"
        return super().refuse(spec, columns)

    def refuse_inputs(self, spec: ActivationSpec, columns: int | None) -> str | None:
        """Return why inputs cannot be quantized so, or None."""
        return self.refuse(spec, columns) or (None if spec.dynamic else f"inputs in {self.name} need act_dynamic=True")

    def neutral(self, groups: Tensor, spec: TensorSpec, largest: Tensor | None = None) -> FloatTunables:
        """Return the tunables of round to nearest: the exponent of the largest |w| comes to lie on the grid's largest."""
        power = power_of_two_below(groups.abs().amax(-1, keepdim=True))
        return self._tunables(groups, power / self.grid(spec).top)

    def search(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None) -> FloatTunables:
        """Return the tunables with the exponent of least weighted squared error: round to nearest's, one more, one less."""
        start = self.neutral(groups, spec).start
        return self._tunables(groups, self._best(groups, spec, start, (2.0, 0.5), importance))

    def candidates(
        self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None
    ) -> list[FloatTunables]:
        """Return the search's choice, and the three exponents that it chose from."""
        start = self.neutral(groups, spec).start
        found = self.search(groups, spec, importance)
        return [found, *(self._tunables(groups, start * factor) for factor in (1.0, 2.0, 0.5))]

    def quantize_inputs(self, inputs: Tensor, spec: ActivationSpec, static: Tensor | None) -> Tensor:
        """Return the inputs as products see them; computed in float32, exact in every dtype."""
        grid = self.grid(spec)

        def rounded(groups: Tensor) -> Tensor:
            largest = groups.abs().amax(-1, keepdim=True)
            if self.exponent == "ceil":
                power = power_of_two_below(largest / grid.largest)
                scale = torch.where(power * grid.largest == largest, power, 2 * power)
            else:  # a quarter of the mantissa's range more, and those from 1.75 on have the next exponent
                scale = (((largest.view(torch.int32) + (1 << 21)) & 0x7F800000).view(torch.float32)) / grid.top
            scale = scale.clamp(_LEAST, _MOST)
            return grid.nearest(groups / scale) * scale

        return by_groups(inputs.float(), spec, rounded).to(inputs.dtype)


MX_FP = Microscaling("mx_fp", {4: E2M1, 8: E4M3})
MX_FP_RCEIL = Microscaling("mx_fp_rceil", {4: E2M1, 8: E4M3}, exponent="ceil")
MX_INT = Microscaling("mx_int", {4: QUARTERS})
