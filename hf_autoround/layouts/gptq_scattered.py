# SPDX-License-Identifier: Apache-2.0
"""GPTQ files whose groups are scattered over the inputs: quantized in the order of activations ("act-order").

Every GPTQ file of other tools holds `g_idx`, the group of each input. In order it says nothing new, and the plain layout
reads the file; out of order, each input brings its own scale and zero point along.

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_autoround.layouts.bits import unpack_bits
from hf_autoround.layouts.codes import from_unsigned
from hf_autoround.layouts.gptq import GPTQ
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group_columns
from hf_autoround.scheme import Granularity, PerGroup, TensorSpec


@dataclass(frozen=True)
class ScatteredGPTQ(GPTQ):
    """The GPTQ layout with a `g_idx` that counts; read, never written."""

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Refuse: weights that we quantize have their groups in order."""
        return "it is read, never written"

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype), `g_idx` (I,) among them."""
        return super().empty(spec, shape) | {"g_idx": ((shape[1],), torch.int32)}

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Return w[k] = (u[k] - z[g_idx[k]]) s[g_idx[k]], as groups of one input: elements (O, I, 1)."""
        out, columns = shape
        group_of = tensors["g_idx"].long()
        codes = unpack_bits(tensors["qweight"].t(), spec.bits, columns)
        stored = unpack_bits(tensors["qzeros"], spec.bits, out).int()[group_of]
        zeros = ((stored + self.zero_offset) & (2**spec.bits - 1)).to(torch.uint8)
        return from_unsigned(codes, zeros.t(), tensors["scales"][group_of].t(), replace(spec, granularity=PerGroup(1)))


def groups_in_order(columns: int, granularity: Granularity) -> Tensor:
    """Return the `g_idx` (I,) int32 that says nothing new."""
    return torch.arange(columns, dtype=torch.int32) // group_columns(columns, granularity)
