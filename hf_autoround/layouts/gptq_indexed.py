# SPDX-License-Identifier: Apache-2.0
"""The GPTQ layout with `g_idx`, the group of each input, as files of other tools have it.

In order, `g_idx` says nothing new. A file that was quantized in the order of activations ("act-order") has its groups
scattered over the inputs: there each input brings its own scale and zero point along.

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_autoround.layouts.base import Layout
from hf_autoround.layouts.bits import unpack_bits
from hf_autoround.layouts.codes import from_unsigned
from hf_autoround.layouts.gptq import GPTQ
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group_columns
from hf_autoround.scheme import Granularity, PerGroup, TensorSpec


@dataclass(frozen=True)
class IndexedGPTQ(Layout):
    """The tensors of `plain`, and `g_idx`."""

    plain: GPTQ
    data_types: tuple[str, ...] = ("int",)

    @property
    def name(self) -> str:
        """The plain layout's name, marked: kernels for that one would take the groups to be in order."""
        return f"{self.plain.name}_indexed"

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        return self.plain.refuse(spec, shape)

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        return self.plain.empty(spec, shape) | {"g_idx": ((shape[1],), torch.int32)}

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return the plain layout's tensors, and g_idx (I,) int32 in order."""
        return self.plain.pack(tensor, spec, columns) | {"g_idx": groups_in_order(columns, spec.granularity)}

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Return w[k] = (u[k] - z[g_idx[k]]) s[g_idx[k]], as groups of one input: elements (O, I, 1)."""
        out, columns = shape
        group_of = tensors["g_idx"].long()
        codes = unpack_bits(tensors["qweight"].t(), spec.bits, columns)
        stored = unpack_bits(tensors["qzeros"], spec.bits, out).int()[group_of]
        zeros = ((stored + self.plain.zero_offset) & (2**spec.bits - 1)).to(torch.uint8)
        return from_unsigned(codes, zeros.t(), tensors["scales"][group_of].t(), replace(spec, granularity=PerGroup(1)))


def groups_in_order(columns: int, granularity: Granularity) -> Tensor:
    """Return the `g_idx` (I,) int32 that says nothing new."""
    return torch.arange(columns, dtype=torch.int32) // group_columns(columns, granularity)
