# SPDX-License-Identifier: Apache-2.0
"""The GPTQ layout: codes packed along the inputs, one column of words per output.

Version 1 stores zero points minus one (what `auto_gptq` and vLLM read), version 2 stores them plainly.
https://github.com/ModelCloud/GPTQModel describes both.

Shapes: O out features, I in features, G groups, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.layouts.base import IntegerLayout
from hf_autoround.layouts.bits import pack_bits, unpack_bits, word_count
from hf_autoround.layouts.codes import from_unsigned, to_unsigned
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group_count
from hf_autoround.scheme import TensorSpec


@dataclass(frozen=True)
class GPTQ(IntegerLayout):
    """`zero_offset` is what is subtracted from a zero point before it is stored: 1 in version 1, 0 in version 2."""

    name: str
    zero_offset: int
    data_types: tuple[str, ...] = ("int",)

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        return None if spec.data_type == "int" else f"it stores integers, not {spec.data_type}"

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        out, columns = shape
        groups = group_count(columns, spec.granularity)
        return {
            "qweight": ((word_count(columns, spec.bits), out), torch.int32),
            "qzeros": ((groups, word_count(out, spec.bits)), torch.int32),
            "scales": ((groups, out), torch.float16),
        }

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return qweight (ceil(I b / 32), O), qzeros (G, ceil(O b / 32)) int32, scales (G, O) float16."""
        codes, zeros, scales = to_unsigned(tensor, spec, columns)
        stored = (zeros.t().int() - self.zero_offset) & (2**spec.bits - 1)
        return {
            "qweight": self.pack_codes(codes, spec),
            "qzeros": pack_bits(stored, spec.bits),
            "scales": scales.t().contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Undo `pack` for a weight (O, I)."""
        codes = self.unpack_codes(tensors["qweight"], spec, shape)
        zeros = self.unpack_zeros(tensors["qzeros"], spec, shape[0])
        return from_unsigned(codes, zeros, tensors["scales"].t(), spec)

    def pack_codes(self, codes: Tensor, spec: TensorSpec) -> Tensor:
        """Return qweight for unsigned codes (O, I)."""
        return pack_bits(codes, spec.bits).t().contiguous()

    def unpack_codes(self, words: Tensor, spec: TensorSpec, shape: tuple[int, int]) -> Tensor:
        """Return the unsigned codes (O, I) uint8 of qweight."""
        return unpack_bits(words.t(), spec.bits, shape[1])

    def unpack_zeros(self, words: Tensor, spec: TensorSpec, out: int) -> Tensor:
        """Return the zero points (O, G) uint8 of qzeros."""
        zeros = unpack_bits(words, spec.bits, out).int() + self.zero_offset
        return (zeros & (2**spec.bits - 1)).t().to(torch.uint8)
