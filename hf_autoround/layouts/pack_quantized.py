# SPDX-License-Identifier: Apache-2.0
"""The `pack-quantized` layout of compressed-tensors: each row a dense stream of codes along the inputs.

https://github.com/vllm-project/compressed-tensors, version 0.18 and newer (older ones pad 3, 5, 6 and 7 bits to whole codes
per word). Zero points are packed along the outputs.

Shapes: O out features, I in features, G groups, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.layouts.base import Layout
from hf_autoround.layouts.bits import pack_bits, unpack_bits, word_count
from hf_autoround.layouts.codes import from_unsigned, to_unsigned
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group_count
from hf_autoround.scheme import TensorSpec


@dataclass(frozen=True)
class PackQuantized(Layout):
    """The layout; it has no options."""

    name: str = "pack_quantized"
    data_types: tuple[str, ...] = ("int",)

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        return None if spec.data_type == "int" else f"it stores integers, not {spec.data_type}"

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        out, columns = shape
        groups = group_count(columns, spec.granularity)
        tensors = {
            "weight_packed": ((out, word_count(columns, spec.bits)), torch.int32),
            "weight_scale": ((out, groups), torch.float16),
            "weight_shape": ((2,), torch.int64),
        }
        return tensors if spec.symmetric else tensors | {"weight_zero_point": ((word_count(out, spec.bits), groups), torch.int32)}

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return weight_packed (O, ceil(I b / 32)), weight_scale (O, G), weight_shape; asymmetric also weight_zero_point."""
        codes, zeros, scales = to_unsigned(tensor, spec, columns)
        tensors = {
            "weight_packed": pack_bits(codes, spec.bits),
            "weight_scale": scales.contiguous(),
            "weight_shape": torch.tensor([len(codes), columns]),
        }
        return tensors if spec.symmetric else tensors | {"weight_zero_point": pack_bits(zeros.t(), spec.bits).t().contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Undo `pack` for a weight (O, I)."""
        out, columns = shape
        codes, scales = unpack_bits(tensors["weight_packed"], spec.bits, columns), tensors["weight_scale"]
        if spec.symmetric:
            zeros = torch.full(scales.shape, 2 ** (spec.bits - 1), dtype=torch.uint8, device=scales.device)
        else:
            zeros = unpack_bits(tensors["weight_zero_point"].t(), spec.bits, out).t()
        return from_unsigned(codes, zeros, scales, spec)
