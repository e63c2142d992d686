# SPDX-License-Identifier: Apache-2.0
"""NVFP4 in files: compressed-tensors' `nvfp4-pack-quantized`. https://github.com/vllm-project/compressed-tensors

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.layouts.base import Layout
from hf_autoround.layouts.bits import pack_nibbles, unpack_nibbles
from hf_autoround.layouts.microscaled import E2M1
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group, group_count, ungroup
from hf_autoround.scheme import TensorSpec


@dataclass(frozen=True)
class NVFP4Packed(Layout):
    """The layout; it has no options."""

    name: str = "nvfp4"
    data_types: tuple[str, ...] = ("nv_fp",)

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        return None if spec.data_type in self.data_types else f"it stores nv_fp, not {spec.data_type}"

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        out, columns = shape
        return {
            "weight_packed": ((out, columns // 2), torch.uint8),
            "weight_scale": ((out, group_count(columns, spec.granularity)), torch.float8_e4m3fn),
            "weight_global_scale": ((1,), torch.float32),
        }

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return weight_packed (O, I / 2) uint8, weight_scale (O, G) float8, and weight_global_scale (1,), which divides it."""
        assert isinstance(tensor.scale, Tensor) and tensor.divisor is not None
        return {
            "weight_packed": pack_nibbles(ungroup(tensor.elements, columns), E2M1),
            "weight_scale": tensor.scale.squeeze(-1).contiguous(),
            "weight_global_scale": tensor.divisor.flatten()[:1].clone(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Undo `pack` for a weight (O, I)."""
        elements = unpack_nibbles(tensors["weight_packed"], E2M1).to(torch.float8_e4m3fn)
        divisor = tensors["weight_global_scale"].view(1, 1, 1).expand(shape[0], 1, 1)
        return QuantizedTensor(group(elements, spec.granularity), tensors["weight_scale"].unsqueeze(-1), divisor=divisor)
