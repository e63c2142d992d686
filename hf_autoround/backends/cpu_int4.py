# SPDX-License-Identifier: Apache-2.0
"""Integers of every width through torch's own int4 kernel for CPUs: up to 4 bits at once, 5 to 8 bits as two halves.

The kernel decodes four to five times faster than a bfloat16 `linear`, and from a few dozen rows on is slower than one. There
the weight is dequantized, some rows at a time, from the kernel's own order: its blocks hold the codes column by column, so
one mask, one subtraction, one conversion and one product with the scales give a transposed piece of the weight.

The kernel computes (code - 8) scale + zero in bfloat16. Other widths are widened to 4 or to 8 bits by zeros below, with a
smaller scale: then the middle stays in the middle and symmetric grids need no zero, which bfloat16 would round, and the high
half of 5 bits holds all but the last of them. 8 bits are 16 high + low.

Shapes: M rows of inputs, N out features, K in features, g inputs that share a scale in the kernel, G = K / g.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend, compute_dtype, every_reason, multiply
from hf_autoround.backends.int4_order import Segment, measured_order
from hf_autoround.layers.packed_linear import PackedLinear, Repacked
from hf_autoround.layouts import IntegerLayout
from hf_autoround.numerics.grouping import group_columns

_GROUPS = (256, 128, 64, 32)  # what the kernel takes
_ROWS = 512  # rows of the weight dequantized at a time
_FEW = {4: 40, 8: 20}  # rows of inputs up to which the kernel is faster, by width


class Int4Codes(Repacked):
    """Codes widened to 4 bits, `high` (N, K / 2), or to 8 bits, of which `low` holds the low four.

    Their scales (G, N, 2) are the kernel's, with what it adds. `zeros` (G, N) are what is subtracted from the codes to
    dequantize them, None if that is the middle everywhere.
    """

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        layout, bits = cast(IntegerLayout, layer.layout), layer.spec.bits
        shape = (layer.out_features, layer.in_features)
        self.width, self.middle = (4, 8) if bits <= 4 else (8, 128)
        self.shift = self.width - bits
        order, group = measured_order(shape[0]), kernel_group(layer)
        assert order is not None and group is not None
        self.order, self.group = order, group
        codes = layout.unpack_codes(layer.qweight, layer.spec, shape) << self.shift
        zeros = self.spread(layout.unpack_zeros(layer.qzeros, layer.spec, shape[0]).t(), layer) << self.shift
        scales = self.scales(layer, torch.float32)
        zero = (self.middle - zeros.float()) * scales
        if self.width == 4:
            self.register_buffer("high", order.pack(codes), persistent=False)
            self.register_buffer("high_scales", _for_kernel(scales, zero), persistent=False)
        else:
            self.register_buffer("high", order.pack(codes >> 4), persistent=False)
            self.register_buffer("high_scales", _for_kernel(16 * scales, zero), persistent=False)
            self.register_buffer("low", order.pack(codes & 15), persistent=False)
            self.register_buffer("low_scales", _for_kernel(scales, 8 * scales), persistent=False)
        same = bool((zeros == self.middle).all())
        self.register_buffer("zeros", None if same else zeros.contiguous(), persistent=False)

    def spread(self, groups: Tensor, layer: PackedLinear) -> Tensor:
        """Return one row for each of the kernel's groups: (layer's groups, N) -> (G, N)."""
        size = group_columns(layer.in_features, layer.spec.granularity)
        if size == self.group:
            return groups
        first = torch.arange(0, layer.in_features, self.group, device=groups.device)
        return groups[first // size]

    def scales(self, layer: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Return the scales of the widened codes, (G, N)."""
        scales = self.spread(layer.scales, layer).to(dtype)
        return scales / 2**self.shift if self.shift else scales

    def codes(self) -> Tensor:
        """Return the unsigned codes (N, K) uint8 of the layer's layout."""
        high = self.order.unpack(self.high)
        codes = high if self.width == 4 else (high << 4) | self.order.unpack(self.low)
        return codes >> self.shift

    def few(self, rows: Tensor) -> Tensor:
        """Return x W^T by the kernel: bfloat16 (M, K) -> (M, N)."""
        rows = rows.contiguous()
        outputs = _kernel(rows, self.high, self.high_scales, self.group)
        return outputs if self.width == 4 else outputs + _kernel(rows, self.low, self.low_scales, self.group)

    def pieces(self, layer: PackedLinear, dtype: torch.dtype) -> Iterator[tuple[Segment, Tensor]]:
        """Yield the weight transposed, some rows at a time: (K, rows of the segment), its columns in the segment's order.

        A piece is overwritten by the next.
        """
        scales = self.scales(layer, dtype)
        columns = layer.in_features
        buffer = torch.empty(columns * min(_ROWS, layer.out_features), dtype=dtype, device=scales.device)
        lows = self.order.segments(self.low, _ROWS) if self.width == 8 else None
        for part in self.order.segments(self.high, _ROWS):
            low = None if lows is None else next(lows).bytes
            blocks, half = len(part.bytes), len(part.order) // 2
            piece = buffer[: columns * blocks * 2 * half].view(columns, blocks, 2 * half)
            for side, codes in enumerate(_halves(part.bytes, low)):
                signed = self._less_zero(codes, part, slice(side * half, (side + 1) * half))
                piece[..., side * half : (side + 1) * half].copy_(signed.transpose(0, 1))
            scale = _in_order(scales, part)
            piece.view(-1, self.group, blocks * 2 * half).mul_(scale.reshape(-1, 1, blocks * 2 * half))
            yield part, piece.view(columns, -1)

    def _less_zero(self, codes: Tensor, part: Segment, side: slice) -> Tensor:
        """Return codes (blocks, K, B / 2) less their zero points, in the smallest type that holds them."""
        if self.zeros is None:
            return codes.view(torch.int8).sub_(8) if self.width == 4 else codes.bitwise_xor_(128).view(torch.int8)
        zeros = _in_order(self.zeros, part)[..., side].transpose(0, 1).unsqueeze(2)  # (blocks, G, 1, B / 2)
        kind = torch.int8 if self.width == 4 else torch.int16
        grouped = codes.to(kind).unflatten(1, (-1, self.group))
        return grouped.sub_(zeros.to(kind)).flatten(1, 2)


class CPUInt4(Backend):
    """2 to 8 bits on a CPU, by torch's int4 kernel, in bfloat16; faster than a bfloat16 model at decoding"""

    name = "cpu_int4"

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return every reason why the kernel cannot run a layer there, or None."""
        rows, columns, spec = layer.out_features, layer.in_features, layer.spec
        reasons = every_reason(
            device.type != "cpu" and f"it runs on a CPU, not on {device.type}",
            spec.data_type != "int" and f"it multiplies integers, not {spec.data_type}",
            set(layer.packed_names) != {"qweight", "qzeros", "scales"} and f"it cannot read the layout {layer.layout.name}",
            layer.compute_dtype == torch.float32
            and "it computes in bfloat16, and the model is in float32: load it with dtype=torch.bfloat16",
            rows % 16 and f"it needs a multiple of 16 outputs, not {rows}",
            kernel_group(layer) is None
            and f"it needs inputs and groups of a multiple of 32, not {columns} in groups of {spec.group_size}",
        )
        return reasons or (None if measured_order(rows) else "this processor keeps int4 codes in an order it cannot undo")

    def prepare(self, layer: PackedLinear) -> None:
        """Pack the codes for the kernel, and drop the layout's."""
        layer.repack(Int4Codes)

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x: float32 in float32, others in bfloat16."""
        return multiply(layer, inputs, _outputs, _input_gradient)


def _outputs(layer: PackedLinear, rows: Tensor) -> Tensor:
    codes = cast(Int4Codes, layer.repacked)
    dtype = compute_dtype(rows)
    if dtype == torch.bfloat16 and 0 < len(rows) <= _FEW[codes.width]:
        return codes.few(rows.to(dtype)).to(rows.dtype)
    outputs = []
    for part, piece in codes.pieces(layer, dtype):
        product = rows.to(dtype) @ piece
        if not part.in_order:
            product = product.unflatten(1, (-1, len(part.order)))[..., part.back].flatten(1)
        outputs.append(product)
    return torch.cat(outputs, 1).to(rows.dtype)


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    codes = cast(Int4Codes, layer.repacked)
    dtype = compute_dtype(gradient)
    total = torch.zeros(len(gradient), layer.in_features, dtype=torch.promote_types(dtype, torch.float32))
    for part, piece in codes.pieces(layer, dtype):
        columns = gradient[:, part.first : part.last].to(dtype)
        if not part.in_order:
            columns = columns.unflatten(1, (-1, len(part.order)))[..., part.order].flatten(1)
        total += columns @ piece.t()
    return total.to(gradient.dtype)


def kernel_group(layer: PackedLinear) -> int | None:
    """Return the largest group of the kernel within which the layer has one scale, or None."""
    size = group_columns(layer.in_features, layer.spec.granularity)
    fitting = (group for group in _GROUPS if size % group == 0 and layer.in_features % group == 0)
    return next(fitting, None)


def _for_kernel(scales: Tensor, zero: Tensor) -> Tensor:
    return torch.stack([scales, zero], -1).bfloat16()


def _kernel(rows: Tensor, packed: Tensor, scales: Tensor, group: int) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scales)


def _halves(high: Tensor, low: Tensor | None) -> Iterator[Tensor]:
    """Yield the codes in the low halves of the bytes, then those in the high halves; `low`: the low four bits of 8."""
    if low is None:
        yield high & 15
        yield high >> 4
    else:
        yield (high << 4) | (low & 15)
        yield (high & 240) | (low >> 4)


def _in_order(values: Tensor, part: Segment) -> Tensor:
    """Return the columns of (G, N) that a segment holds, in its order: (G, blocks, B)."""
    columns = values[:, part.first : part.last].unflatten(1, (-1, len(part.order)))
    return columns if part.in_order else columns[..., part.order]
