# SPDX-License-Identifier: Apache-2.0
"""Symmetric 8 bits with one scale for each output, through torch's own int8 kernel for CPUs.

Above a few rows the codes are converted, some rows at a time, which is exact in bfloat16; the scales multiply the outputs.

Shapes: M rows of inputs, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_autoround.backends.base import Backend, compute_dtype, every_reason, multiply
from hf_autoround.layers.packed_linear import PackedLinear, Repacked
from hf_autoround.layouts import IntegerLayout
from hf_autoround.numerics.grouping import group_count

_FEW = 16  # rows up to which the kernel is faster
_ROWS = 512  # rows of the weight converted at a time


class Int8Codes(Repacked):
    """The signed codes (N, K), and their scales (N,) as the kernel takes them."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        shape = (layer.out_features, layer.in_features)
        codes = cast(IntegerLayout, layer.layout).unpack_codes(layer.qweight, layer.spec, shape)
        self.register_buffer("signed", (codes ^ 128).view(torch.int8).contiguous(), persistent=False)
        self.register_buffer("scales", layer.scales[0].bfloat16(), persistent=False)

    def codes(self) -> Tensor:
        """Return the unsigned codes (N, K) uint8 of the layer's layout."""
        return self.signed.view(torch.uint8) ^ 128

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the codes as numbers, some rows at a time."""
        for first in range(0, len(self.signed), _ROWS):
            rows = slice(first, first + _ROWS)
            yield rows, self.signed[rows].to(dtype)


class CPUInt8(Backend):
    """symmetric 8 bits per output channel on a CPU, by torch's int8 kernel, in bfloat16"""

    name = "cpu_int8"

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return every reason why the kernel cannot run a layer there, or None."""
        spec = layer.spec
        reasons = every_reason(
            device.type != "cpu" and f"it runs on a CPU, not on {device.type}",
            (spec.data_type != "int" or spec.bits != 8 or not spec.symmetric)
            and f"it multiplies symmetric integers of 8 bits, not {layer.scheme.name}",
            set(layer.packed_names) != {"qweight", "qzeros", "scales"} and f"it cannot read the layout {layer.layout.name}",
            layer.compute_dtype == torch.float32
            and "it computes in bfloat16, and the model is in float32: load it with dtype=torch.bfloat16",
            group_count(layer.in_features, spec.granularity) != 1
            and f"it needs one scale for each output, not groups of {spec.group_size} inputs",
            # torch does not check it, and reads past the end
            layer.in_features % 16 and f"it needs a multiple of 16 inputs, not {layer.in_features}",
        )
        return reasons or _refuse_zeros(layer)

    def prepare(self, layer: PackedLinear) -> None:
        """Put the codes into rows, and drop the layout's."""
        layer.repack(Int8Codes)

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x: float32 in float32, others in bfloat16."""
        return multiply(layer, inputs, _outputs, _input_gradient)


def _refuse_zeros(layer: PackedLinear) -> str | None:
    zeros = cast(IntegerLayout, layer.layout).unpack_zeros(layer.qzeros, layer.spec, layer.out_features)
    return None if bool((zeros == 128).all()) else "its zero points are not in the middle"


def _outputs(layer: PackedLinear, rows: Tensor) -> Tensor:
    codes, dtype = cast(Int8Codes, layer.repacked), compute_dtype(rows)
    values = rows.to(dtype)
    if dtype == torch.bfloat16 and 0 < len(rows) <= _FEW:
        return torch.ops.aten._weight_int8pack_mm(values.contiguous(), codes.signed, codes.scales).to(rows.dtype)
    outputs = torch.cat([F.linear(values, piece) for _, piece in codes.pieces(dtype)], 1)
    return (outputs * layer.scales[0].to(dtype)).to(rows.dtype)


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    codes, dtype = cast(Int8Codes, layer.repacked), compute_dtype(gradient)
    scaled = gradient.to(dtype) * layer.scales[0].to(dtype)
    total = torch.zeros(len(gradient), layer.in_features, dtype=torch.promote_types(dtype, torch.float32))
    for rows, piece in codes.pieces(dtype):
        total += scaled[:, rows] @ piece
    return total.to(gradient.dtype)
