# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN202 - Triton reads the annotations of a kernel's arguments itself: only `tl.constexpr` means something
"""Triton kernels for the GPTQ layouts, and the PyTorch operators around them.

Three kernels, by the number of rows: a vector kernel for decoding, bound by the bytes of the weight; a tiled one that
dequantizes inside the product; and above that a dense copy of the weight, which the vendor's own product multiplies with
faster than any kernel here could. The dense copy is also what the gradient needs.

This module imports Triton when it is imported (kernels find `tl` among its globals), so it is imported where it is used.

Shapes: M rows, K in features, N out features, G groups, b bits. 32 codes of a column of K fill b words; qweight
(K b / 32, N), qzeros (G, ceil(N b / 32)) int32, scales (G, N).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_ROWS = 4  # up to here, reading the weight again for each row (from the cache) costs less than padding rows to a tile
TILED_ROWS = 64  # up to here, writing a dense weight costs more than the product
PROGRAMS = 256  # enough for every multiprocessor of a large GPU: short outputs share K among programs until there are as many


@triton.jit
def _read_codes(words, position, stride, mask, bits: tl.constexpr):
    """Return the codes at positions of a dense bit stream whose words lie `stride` apart."""
    start = position * bits
    shift = (start % 32).to(tl.uint32)
    codes = tl.load(words + start // 32 * stride, mask, 0).to(tl.uint32, bitcast=True) >> shift
    if 32 % bits != 0:  # a code may go on in the next word; shifted twice, for a shift by 32 is undefined
        high = tl.load(words + (start // 32 + 1) * stride, mask & (shift + bits > 32), 0).to(tl.uint32, bitcast=True)
        codes |= (high << (31 - shift)) << 1
    return codes & (2**bits - 1)


@triton.jit
def _read_zeros(qzeros, group, column, columns, zero_words, zero_offset: tl.constexpr, bits: tl.constexpr):
    """Return the zero points of groups and columns, float32."""
    stored = _read_codes(qzeros + group * zero_words, column, 1, column < columns, bits)
    return ((stored + zero_offset) & (2**bits - 1)).to(tl.float32)


@triton.jit
def _dequantized_tile(
    qweight, qzeros, scales, block, column, inner, columns, zero_words,
    bits: tl.constexpr, group: tl.constexpr, zero_offset: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Return rows `block * block_k ...` of the weight at some columns: (block_k, columns) float32. Lies within a group."""
    inside = column < columns
    if 32 % bits == 0:
        per_word: tl.constexpr = 32 // bits
        row = block * (block_k // per_word) + tl.arange(0, block_k // per_word)
        mask = (row[:, None] * per_word < inner) & inside[None, :]
        words = tl.load(qweight + row[:, None] * columns + column[None, :], mask, 0)
        codes = (words[:, None, :] >> (tl.arange(0, per_word) * bits)[None, :, None]) & (2**bits - 1)
        codes = tl.reshape(codes, (block_k, column.shape[0]))
    else:
        row = block * block_k + tl.arange(0, block_k)
        mask = (row[:, None] < inner) & inside[None, :]
        codes = _read_codes(qweight + column[None, :], row[:, None], columns, mask, bits)
    index = block * block_k // group
    scale = tl.load(scales + index * columns + column, inside, 0).to(tl.float32)
    zero = _read_zeros(qzeros, index, column, columns, zero_words, zero_offset, bits)
    return (codes.to(tl.float32) - zero[None, :]) * scale[None, :]


@triton.jit
def _vector_kernel(
    inputs, qweight, qzeros, scales, outputs, rows, inner, columns, zero_words, tiles_per_split,
    bits: tl.constexpr, group: tl.constexpr, zero_offset: tl.constexpr, block_n: tl.constexpr, chunks: tl.constexpr,
):  # fmt: skip
    """One row times `block_n` columns. A chunk is 32 codes: its words are read once each and its codes peeled off in order."""
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    row, split = tl.program_id(1), tl.program_id(2)
    inside = column < columns
    sums = tl.zeros((chunks, block_n), tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        chunk = tile * chunks + tl.arange(0, chunks)
        exists = chunk * 32 < inner
        mask = exists[:, None] & inside[None, :]
        words = qweight + chunk[:, None] * (bits * columns) + column[None, :]
        products = tl.zeros((chunks, block_n), tl.float32)
        input_sum = tl.zeros((chunks,), tl.float32)
        word = tl.load(words, mask, 0).to(tl.uint32, bitcast=True)
        for place in tl.static_range(32):
            if place > 0 and place * bits % 32 == 0:
                word = tl.load(words + place * bits // 32 * columns, mask, 0).to(tl.uint32, bitcast=True)
            codes = word >> (place * bits % 32)
            if place * bits % 32 + bits > 32:  # the code goes on in the next word
                word = tl.load(words + (place * bits // 32 + 1) * columns, mask, 0).to(tl.uint32, bitcast=True)
                codes |= word << (32 - place * bits % 32)
            value = tl.load(inputs + row * inner + chunk * 32 + place, exists, 0).to(tl.float32)
            products += value[:, None] * (codes & (2**bits - 1)).to(tl.float32)
            input_sum += value
        index = chunk[:, None] * 32 // group
        scale = tl.load(scales + index * columns + column[None, :], mask, 0).to(tl.float32)
        zeros = _read_codes(qzeros + index * zero_words, column[None, :], 1, mask, bits)
        zeros = ((zeros + zero_offset) & (2**bits - 1)).to(tl.float32)
        sums += (products - zeros * input_sum[:, None]) * scale
    place_out = outputs + (split * rows + row) * columns + column
    tl.store(place_out, tl.sum(sums, 0).to(outputs.dtype.element_ty), inside)


@triton.jit
def _tiled_kernel(
    inputs, qweight, qzeros, scales, outputs, rows, inner, columns, zero_words, blocks_per_split,
    bits: tl.constexpr, group: tl.constexpr, zero_offset: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """`block_m` rows times `block_n` columns, the weight rounded to the inputs' dtype as a dense layer's would be."""
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    row = tl.program_id(1) * block_m + tl.arange(0, block_m)
    split = tl.program_id(2)
    sums = tl.zeros((block_m, block_n), tl.float32)
    for block in range(split * blocks_per_split, (split + 1) * blocks_per_split):
        k = block * block_k + tl.arange(0, block_k)
        values = tl.load(inputs + row[:, None] * inner + k[None, :], (row[:, None] < rows) & (k[None, :] < inner), 0)
        weight = _dequantized_tile(
            qweight, qzeros, scales, block, column, inner, columns, zero_words, bits, group, zero_offset, block_k
        )
        sums = tl.dot(values, weight.to(values.dtype), sums, input_precision="ieee")
    place_out = outputs + (split * rows + row[:, None]) * columns + column[None, :]
    tl.store(place_out, sums.to(outputs.dtype.element_ty), (row[:, None] < rows) & (column[None, :] < columns))


@triton.jit
def _dense_kernel(
    qweight, qzeros, scales, weight, inner, columns, zero_words,
    bits: tl.constexpr, group: tl.constexpr, zero_offset: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Write a tile of the weight (K, N)."""
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    block = tl.program_id(1)
    tile = _dequantized_tile(
        qweight, qzeros, scales, block, column, inner, columns, zero_words, bits, group, zero_offset, block_k
    )
    k = block * block_k + tl.arange(0, block_k)
    place_out = weight + k[:, None].to(tl.int64) * columns + column[None, :]  # a large head has more than 2^31 weights
    tl.store(place_out, tile.to(weight.dtype.element_ty), (k[:, None] < inner) & (column[None, :] < columns))


class Launch(NamedTuple):
    """A kernel and its sizes: how many rows a program takes, how many inputs each of its steps."""

    kernel: triton.runtime.KernelInterface
    rows: int
    step: int
    blocks: dict[str, int]
    stages: int = 3


def product_launch(rows: int, bits: int, group: int) -> Launch:
    """Return the kernel for a product with few rows."""
    if rows <= VECTOR_ROWS:
        return Launch(_vector_kernel, rows=1, step=16 * 32, blocks=dict(block_n=64, chunks=16))
    height, step = max(16, triton.next_power_of_2(rows)), _within_group(group)
    # codes that straddle words are loaded twice each: four stages would not fit the shared memory of consumer GPUs
    stages = 4 if 32 % bits == 0 else 2
    return Launch(_tiled_kernel, height, step, dict(block_m=height, block_n=64, block_k=step), stages)


def dense_launch(group: int) -> Launch:
    """Return the kernel that writes the dense weight."""
    step = _within_group(group)
    return Launch(_dense_kernel, rows=0, step=step, blocks=dict(block_n=128, block_k=step))


def _within_group(group: int) -> int:
    return 64 if group % 64 == 0 else 32


@torch.library.custom_op("hf_autoround::gptq_matmul", mutates_args=())
def gptq_matmul(
    inputs: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group: int, zero_offset: int
) -> Tensor:
    """(M, K) by packed (K, N) -> (M, N), summed in float32, in the dtype of the inputs."""
    (rows, inner), columns = inputs.shape, qweight.shape[1]
    tiled = rows <= TILED_ROWS and inputs.dtype != torch.float32  # float32 has no tensor cores: its tiles spill registers
    if rows > VECTOR_ROWS and not tiled:
        return inputs @ gptq_dense(qweight, qzeros, scales, inner, bits, group, zero_offset, inputs.dtype)
    if rows == 0:
        return inputs.new_empty(0, columns)
    launch = product_launch(rows, bits, group)
    wide, tall = triton.cdiv(columns, launch.blocks["block_n"]), triton.cdiv(rows, launch.rows)
    steps = triton.cdiv(inner, launch.step)
    per_split = triton.cdiv(steps, max(1, min(PROGRAMS // (wide * tall), steps)))
    splits = triton.cdiv(steps, per_split)
    # sums of the splits are added afterwards, not atomically: the same inputs give the same bits
    outputs = inputs.new_empty(splits, rows, columns, dtype=inputs.dtype if splits == 1 else torch.float32)
    with torch.cuda.device_of(inputs):  # a launch goes to the current GPU, which need not be the layer's
        launch.kernel[(wide, tall, splits)](
            inputs.contiguous(), qweight, qzeros, scales, outputs, rows, inner, columns, qzeros.shape[1], per_split,
            bits=bits, group=group, zero_offset=zero_offset, **launch.blocks, num_stages=launch.stages,
        )  # fmt: skip
    return outputs[0] if splits == 1 else outputs.sum(0).to(inputs.dtype)


@torch.library.custom_op("hf_autoround::gptq_dense", mutates_args=())
def gptq_dense(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, inner: int, bits: int, group: int, zero_offset: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight (K, N) in a dtype: what `layer.dequantized(dtype).t()` is, bit for bit."""
    columns, launch = qweight.shape[1], dense_launch(group)
    weight = qweight.new_empty(inner, columns, dtype=dtype)
    with torch.cuda.device_of(qweight):
        launch.kernel[(triton.cdiv(columns, launch.blocks["block_n"]), triton.cdiv(inner, launch.step))](
            qweight, qzeros, scales, weight, inner, columns, qzeros.shape[1],
            bits=bits, group=group, zero_offset=zero_offset, **launch.blocks, num_stages=launch.stages,
        )  # fmt: skip
    return weight


@gptq_dense.register_fake
def _(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, inner: int, bits: int, group: int, zero_offset: int, dtype: torch.dtype
) -> Tensor:
    return qweight.new_empty(inner, qweight.shape[1], dtype=dtype)


@gptq_matmul.register_fake
def _(inputs: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group: int, zero_offset: int) -> Tensor:
    return inputs.new_empty(inputs.shape[0], qweight.shape[1])
