# SPDX-License-Identifier: Apache-2.0
"""Integers of every width through torch's own int4 kernel for CPUs: up to 4 bits at once, 5 to 8 bits as two halves.

The kernel decodes two to five times faster than a bfloat16 `linear`, and from a few dozen rows on is slower than one. There
the weight is dequantized from the kernel's own order, some rows at a time, and multiplied in bfloat16. That is eight to ten
passes of torch over the codes, 1.2 to 2 ns for each weight, whatever M is; a product of 512 rows takes 1.2 ns for each on a
processor with AMX, and several times that without.

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

from hf_autoround.backends.base import Backend, compute_dtype, every_reason, multiply, register_operator
from hf_autoround.backends.int4_order import Int4Order, Segment, measured_order, transposed
from hf_autoround.layers.packed_linear import PackedLinear, Repacked
from hf_autoround.layouts import IntegerLayout
from hf_autoround.numerics.grouping import group_columns

_GROUPS = (256, 128, 64, 32)  # what the kernel takes
_PIECE = 1 << 22  # weights dequantized, then multiplied at a time: after a product the caches are cold
_SCRATCH = 1 << 18  # of which scaled at a time, in float32
_FEW = {4: 48, 8: 32}  # rows of inputs up to which the kernel is faster, by width


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
            self.register_buffer("low", None, persistent=False)
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

    def operands(self, layer: PackedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return what `int4_matmul` takes for inputs of a dtype."""
        return self.high, self.low, self.scales(layer, torch.promote_types(dtype, torch.float32)), self.zeros


class CPUInt4(Backend):
    """2 to 8 bits on a CPU, by torch's int4 kernel, in bfloat16; faster than a bfloat16 model at decoding"""

    name = "cpu_int4"
    compiles = True

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
    product = torch.ops.hf_autoround.int4_matmul if torch.compiler.is_compiling() else int4_matmul
    return product(rows.to(dtype), *codes.operands(layer, dtype)).to(rows.dtype)


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    codes = cast(Int4Codes, layer.repacked)
    dtype = compute_dtype(gradient)
    product = torch.ops.hf_autoround.int4_matmul_back if torch.compiler.is_compiling() else int4_matmul_back
    return product(gradient.to(dtype), *codes.operands(layer, dtype)).to(gradient.dtype)


def int4_matmul(rows: Tensor, high: Tensor, low: Tensor | None, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Dequantize and multiply: rows (M, K) by the codes and scales (G, N) of `Int4Codes` -> (M, N), in the dtype of the rows."""
    outputs = rows.new_empty(len(rows), len(high))
    for some, piece in _pieces(rows.dtype, high, low, scales, zeros):
        outputs[:, some] = rows @ piece.t()
    return outputs


def int4_matmul_back(rows: Tensor, high: Tensor, low: Tensor | None, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The same with the weight's transpose: (M, N) -> (M, K), in the dtype of the rows, summed in the scales'."""
    total = rows.new_zeros(len(rows), high.shape[1] * 2, dtype=scales.dtype)
    for some, piece in _pieces(rows.dtype, high, low, scales, zeros):
        total += rows[:, some] @ piece
    return total.to(rows.dtype)


def _pieces(
    dtype: torch.dtype, high: Tensor, low: Tensor | None, scales: Tensor, zeros: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight, some rows at a time: (rows, K). A piece is overwritten by the next."""
    outputs, columns = len(high), high.shape[1] * 2
    group, order = columns // len(scales), cast(Int4Order, measured_order(outputs))
    scales = _by_rows(scales)
    zeros = None if zeros is None else _by_rows(zeros)
    most = min(max(_PIECE // columns // 64, 1) * 64, outputs)
    codes, piece = torch.empty(most, columns, dtype=torch.uint8), torch.empty(most, columns, dtype=dtype)
    scratch = torch.empty(min(max(_SCRATCH // columns, 1), most), columns, dtype=scales.dtype)
    lows = None if low is None else order.segments(low, most)
    for part in order.segments(high, most):
        rows, size = slice(part.first, part.last), part.last - part.first
        _write_codes(codes[:size], part, None if lows is None else next(lows))
        numbers = codes[:size].view(torch.int8)
        if lows is None:  # their difference to any zero fits into int8, which costs a quarter of float32
            numbers = numbers.unflatten(1, (-1, group)).sub_(8 if zeros is None else zeros[rows].view(torch.int8))
        else:
            numbers = codes[:size].bitwise_xor_(128).view(torch.int8).unflatten(1, (-1, group))
        for first in range(0, size, len(scratch)):
            some = slice(first, min(first + len(scratch), size))
            values = scratch[: some.stop - first].unflatten(1, (-1, group)).copy_(numbers[some])
            if lows is not None and zeros is not None:
                values.sub_(zeros[rows][some].to(values.dtype) - 128)
            piece[some].copy_(values.mul_(scales[rows][some]).flatten(1))
        yield rows, piece[:size]


def _write_codes(codes: Tensor, high: Segment, low: Segment | None) -> None:
    """Write a segment's codes, (rows, K) uint8."""
    blocks = codes.unflatten(0, (len(high.bytes), -1))
    low_rows, high_rows = blocks[:, high.side(0)], blocks[:, high.side(1)]
    if low is None:
        both = transposed(high.bytes)
        torch.bitwise_and(both, 15, out=low_rows)
        torch.bitwise_right_shift(both, 4, out=high_rows)
    else:
        low_rows.copy_(transposed((high.bytes << 4).bitwise_or_(low.bytes & 15)))
        high_rows.copy_(transposed((high.bytes & 240).bitwise_or_(low.bytes >> 4)))


# of these passes over bytes torch.compile makes code that is ten times slower
register_operator(int4_matmul, lambda rows, high, low, scales, zeros: rows.new_empty(rows.shape[0], high.shape[0]))
register_operator(int4_matmul_back, lambda rows, high, low, scales, zeros: rows.new_empty(rows.shape[0], high.shape[1] * 2))


def kernel_group(layer: PackedLinear) -> int | None:
    """Return the largest group of the kernel within which the layer has one scale, or None."""
    size = group_columns(layer.in_features, layer.spec.granularity)
    fitting = (group for group in _GROUPS if size % group == 0 and layer.in_features % group == 0)
    return next(fitting, None)


def _for_kernel(scales: Tensor, zero: Tensor) -> Tensor:
    return torch.stack([scales, zero], -1).bfloat16()


def _kernel(rows: Tensor, packed: Tensor, scales: Tensor, group: int) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scales)


def _by_rows(groups: Tensor) -> Tensor:
    """Return (G, N) as (N, G, 1)."""
    return groups.t().unsqueeze(2).contiguous()
