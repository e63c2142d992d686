# SPDX-License-Identifier: Apache-2.0
"""The `int-quantized` layout of compressed-tensors: signed 8-bit codes as they are, one scale for each row.

https://github.com/vllm-project/compressed-tensors

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.layouts.base import Layout
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group, ungroup
from hf_autoround.scheme import PerChannel, TensorSpec


@dataclass(frozen=True)
class IntQuantized(Layout):
    """The layout; it has no options."""

    name: str = "int_quantized"
    data_types: tuple[str, ...] = ("int",)

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        if spec.data_type != "int" or spec.bits != 8 or not spec.symmetric or spec.granularity != PerChannel():
            return "it stores symmetric integers of 8 bits with a scale for each row"
        return None

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        return {"weight": (shape, torch.int8), "weight_scale": ((shape[0], 1), torch.float16)}

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return weight (O, I) int8 and weight_scale (O, 1) float16."""
        assert isinstance(tensor.scale, Tensor)
        return {"weight": ungroup(tensor.elements, columns).contiguous(), "weight_scale": tensor.scale.squeeze(-1).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Undo `pack` for a weight (O, I)."""
        return QuantizedTensor(group(tensors["weight"], spec.granularity), tensors["weight_scale"].unsqueeze(-1))
