# SPDX-License-Identifier: Apache-2.0
"""The affine layout of MLX: each row a dense stream of codes along the inputs, w = scale * code + bias for each group.

https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html. A symmetric grid has the bias
-scale * 2^(b-1): a power of two times what 16 bits hold, which 16 bits hold too. An asymmetric one would need
-scale * zero point, which they do not: the numbers served would not be those that were tuned, so none is written. Biases
that are no such product, as MLX's own converter makes them, are read as they are.

Shapes: O out features, I in features, G groups, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_autoround.layouts.base import Layout
from hf_autoround.layouts.bits import pack_bits, unpack_bits, word_count
from hf_autoround.numerics import QuantizedTensor, dequantize
from hf_autoround.numerics.grouping import group, group_count, ungroup
from hf_autoround.scheme import TensorSpec

_BITS = (2, 3, 4, 5, 6, 8)
_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class MLX(Layout):
    """`scale_dtype` is that of scales and biases: what multiplies activations of another one makes float32 of both."""

    scale_dtype: torch.dtype = torch.float16
    name: str = "mlx"
    data_types: tuple[str, ...] = ("int",)

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        if spec.data_type != "int":
            return f"it stores integers, not {spec.data_type}"
        if spec.bits not in _BITS:
            return f"it stores 2, 3, 4, 5, 6 or 8 bits, not {spec.bits}"
        if spec.group_size not in _SIZES:
            return f"it stores groups of 32, 64 or 128 inputs, not group_size={spec.group_size}"
        if shape[1] % spec.group_size:
            return f"it stores whole groups of {spec.group_size} inputs, and {shape[1]} inputs are none"
        if not spec.symmetric:
            return "it stores no zero point but its product with the scale, which 16 bits would round; symmetric grids are exact"
        return None

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        out, columns = shape
        groups = (out, group_count(columns, spec.granularity))
        return {
            "weight": ((out, word_count(columns, spec.bits)), torch.uint32),
            "scales": (groups, self.scale_dtype),
            "biases": (groups, self.scale_dtype),
        }

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return weight (O, I b / 32) uint32, scales and biases (O, G); the latter exact if the tensor is symmetric."""
        scales, lowest = dequantize(tensor.scale), _lowest(spec)
        codes = ungroup(tensor.elements, columns).view(torch.uint8) - lowest
        biases = scales * (lowest if tensor.zero_point is None else lowest - tensor.zero_point.float())
        if tensor.minimum is not None:
            biases = biases - dequantize(tensor.minimum)
        return {
            "weight": pack_bits(codes, spec.bits).view(torch.uint32),
            "scales": scales.squeeze(-1).to(self.scale_dtype),
            "biases": biases.squeeze(-1).to(self.scale_dtype),
        }

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Return the numbers of a weight (O, I); `minimum` is what a bias is off the symmetric grid's, there 0."""
        scales, lowest = tensors["scales"].unsqueeze(-1), _lowest(spec)
        codes = unpack_bits(tensors["weight"].view(torch.int32), spec.bits, shape[1])
        elements = (codes.to(torch.int16) + lowest).to(torch.int8 if spec.symmetric else torch.uint8)
        minimum = scales.float() * lowest - tensors["biases"].unsqueeze(-1).float()
        return QuantizedTensor(group(elements, spec.granularity), scales, None, minimum)

    def as_stored(self, dtypes: Mapping[str, torch.dtype]) -> MLX:
        """Return the layout with the dtype that a file's scales have."""
        return replace(self, scale_dtype=dtypes.get("scales", self.scale_dtype))


def _lowest(spec: TensorSpec) -> int:
    """Return the element that code 0 stands for."""
    return -(2 ** (spec.bits - 1)) if spec.symmetric else 0
