# SPDX-License-Identifier: Apache-2.0
"""The AWQ "gemm" layout: 4-bit codes packed along the outputs, eight to a word in the order its kernels want.

https://github.com/casper-hansen/AutoAWQ

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.layouts.base import IntegerLayout
from hf_autoround.layouts.bits import pack_bits, unpack_bits
from hf_autoround.layouts.codes import from_unsigned, to_unsigned
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group_count
from hf_autoround.scheme import TensorSpec

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds output column 8 w + _ORDER[i]
_INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AWQ(IntegerLayout):
    """The layout; it has no options."""

    name: str = "awq"
    data_types: tuple[str, ...] = ("int",)

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        if spec.data_type != "int" or spec.bits != 4:
            return f"it stores 4 bits, not {spec.bits}"
        return None if shape[0] % 8 == 0 else f"it needs a multiple of 8 outputs, not {shape[0]}"

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        out, columns = shape
        groups = group_count(columns, spec.granularity)
        return {
            "qweight": ((columns, out // 8), torch.int32),
            "qzeros": ((groups, out // 8), torch.int32),
            "scales": ((groups, out), torch.float16),
        }

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return qweight (I, O / 8), qzeros (G, O / 8) int32, scales (G, O) float16."""
        codes, zeros, scales = to_unsigned(tensor, spec, columns)
        return {
            "qweight": self.pack_codes(codes, spec),
            "qzeros": pack_bits(_reorder(zeros.t(), _ORDER), 4),
            "scales": scales.t().contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Undo `pack` for a weight (O, I)."""
        codes = self.unpack_codes(tensors["qweight"], spec, shape)
        zeros = self.unpack_zeros(tensors["qzeros"], spec, shape[0])
        return from_unsigned(codes, zeros, tensors["scales"].t(), spec)

    def pack_codes(self, codes: Tensor, spec: TensorSpec) -> Tensor:
        """Return qweight for unsigned codes (O, I)."""
        rows = codes.unflatten(0, (-1, 8))[:, _ORDER]
        octets = rows[:, 0::2] | rows[:, 1::2] << 4  # (O / 8, 4, I)
        return octets.permute(2, 0, 1).contiguous().view(torch.int32).squeeze(-1)

    def unpack_codes(self, words: Tensor, spec: TensorSpec, shape: tuple[int, int]) -> Tensor:
        """Return the unsigned codes (O, I) uint8 of qweight."""
        return _reorder(unpack_bits(words, 4, shape[0]), _INVERSE).t()

    def unpack_zeros(self, words: Tensor, spec: TensorSpec, out: int) -> Tensor:
        """Return the zero points (O, G) uint8 of qzeros."""
        return _reorder(unpack_bits(words, 4, out), _INVERSE).t()


def _reorder(columns: Tensor, order: list[int]) -> Tensor:
    """Permute within each run of eight columns of (R, O)."""
    return columns.unflatten(1, (-1, 8))[..., order].flatten(1)
