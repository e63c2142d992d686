# SPDX-License-Identifier: Apache-2.0
"""Microscaling formats in files: elements of 4 bits (two to a byte, even column low) or 8, and each group's exponent.

It is the layout of compressed-tensors' `mxfp4-pack-quantized` and `mxfp8-quantized`, and of auto-round's MXINT4, whose
magnitudes are 0 to 7 quarters. https://github.com/vllm-project/compressed-tensors

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.layouts.base import Layout
from hf_autoround.layouts.bits import pack_nibbles, unpack_nibbles
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group, group_count, ungroup
from hf_autoround.scheme import TensorSpec

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_QUARTERS = torch.arange(8) / 4
_BIAS = 127


@dataclass(frozen=True)
class Microscaled(Layout):
    """The layout; it has no options."""

    name: str = "microscaled"
    data_types: tuple[str, ...] = ("mx_fp", "mx_fp_rceil", "mx_int")

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        return None if spec.data_type in self.data_types else f"it stores microscaled numbers, not {spec.data_type}"

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        out, columns = shape
        scales = {"weight_scale": ((out, group_count(columns, spec.granularity)), torch.uint8)}
        if spec.bits == 8:
            return {"weight": (shape, torch.float8_e4m3fn)} | scales
        return {"weight_packed": ((out, columns // 2), torch.uint8)} | scales

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return weight_packed (O, I / 2) uint8 or weight (O, I) float8, and weight_scale (O, G): exponents plus 127."""
        assert isinstance(tensor.scale, Tensor)
        exponents = torch.frexp(tensor.scale.squeeze(-1)).exponent - 1
        scales = {"weight_scale": (exponents + _BIAS).to(torch.uint8)}
        elements = ungroup(tensor.elements, columns)
        if spec.bits == 8:
            return {"weight": elements.contiguous()} | scales
        return {"weight_packed": pack_nibbles(elements, _magnitudes(spec))} | scales

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Undo `pack` for a weight (O, I)."""
        exponents = tensors["weight_scale"].int() - _BIAS
        scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents).unsqueeze(-1)
        if spec.bits == 8:
            elements = tensors["weight"]
        else:
            elements = unpack_nibbles(tensors["weight_packed"], _magnitudes(spec)).to(torch.float8_e4m3fn)
        return QuantizedTensor(group(elements, spec.granularity), scale)


def _magnitudes(spec: TensorSpec) -> Tensor:
    return _QUARTERS if spec.data_type == "mx_int" else E2M1
