# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN202 - Triton reads the annotations of a kernel's arguments itself: only `tl.constexpr` means something
"""Triton kernels for the GPTQ layouts, and the PyTorch operators around them.

Three kernels, by the number of rows: a vector kernel for decoding; a tiled one that dequantizes inside the product; and above
that a dense copy of the weight, which the vendor's own product multiplies with faster than any kernel here could. The dense
copy is also what the gradient needs. Limits and sizes are what was fastest on an H100 (benchmarks/README.md).

This module imports Triton when it is imported (kernels find `tl` among its globals), so it is imported where it is used.

Shapes: M rows, K in features, N out features, G groups, b bits. 32 codes of a column of K fill b words; qweight
(K b / 32, N), qzeros (G, ceil(N b / 32)) int32, scales (G, N).
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_autoround.backends.base import register_operator

VECTOR_ROWS = 2  # up to here, reading the weight again for each row costs less than padding rows to a tile
TILED_ROWS = 64  # up to here, writing a dense weight costs more than the product
STRADDLING_ROWS = 32  # the same where codes straddle words
WIDE = 8192  # outputs from which the vector kernel need not be cut small to have enough programs
PROGRAMS = 512  # four for every multiprocessor of a large GPU: few tiles share K among programs until there are as many


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
def _exponent(columns, bits: tl.constexpr):
    """Return the bits of 2^bits as float32.

    The compiler is not to know them (`columns >> 31` is 0): as a constant they would cost `_numbers` a third instruction.
    """
    unknown = tl.cast(columns, tl.int32)  # of a single column Triton makes a constant, which has no methods
    return (((127 + bits) << 23) + (unknown >> 31)).to(tl.uint32, bitcast=True)


@triton.jit
def _numbers(codes, exponent, place: tl.constexpr, bits: tl.constexpr):
    """Return codes that start at bit `place` of words as float32, plus 2^bits: exact, and so are differences of such numbers.

    A code becomes the start of a mantissa by one shift and one operation of logic, which is faster than a conversion.
    """
    left: tl.constexpr = 23 - bits - place
    codes = codes << left if left >= 0 else codes >> -left
    return (codes & ((2**bits - 1) << (23 - bits)) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def _next_numbers(words, word, exponent, place: tl.constexpr, stride, mask, bits: tl.constexpr):
    """Return the codes at a place of chunks of 32 as numbers plus 2^bits, and the words that they end in: each is loaded once."""
    shift: tl.constexpr = place * bits % 32
    if shift == 0:
        word = tl.load(words + place * bits // 32 * stride, mask, 0).to(tl.uint32, bitcast=True)
    if shift + bits <= 32:
        numbers = _numbers(word, exponent, shift, bits)
    else:
        low = word >> shift
        word = tl.load(words + (place * bits // 32 + 1) * stride, mask, 0).to(tl.uint32, bitcast=True)
        numbers = _numbers(low | word << (32 - shift), exponent, 0, bits)
    return numbers, word


@triton.jit
def _zeros_and_scales(
    qzeros, scales, index, column, columns, zero_words, mask, exponent, zero_offset: tl.constexpr, bits: tl.constexpr
):
    """Return the zero points plus 2^bits and the scales of groups and columns, float32."""
    zeros = _read_codes(qzeros + index * zero_words, column, 1, mask, bits) + zero_offset
    return _numbers(zeros, exponent, 0, bits), tl.load(scales + index * columns + column, mask, 0).to(tl.float32)


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
        codes = tl.reshape(codes, (block_k, column.shape[0])).to(tl.uint32, bitcast=True)
    else:
        row = block * block_k + tl.arange(0, block_k)
        mask = (row[:, None] < inner) & inside[None, :]
        codes = _read_codes(qweight + column[None, :], row[:, None], columns, mask, bits)
    index, exponent = block * block_k // group, _exponent(columns, bits)
    zero, scale = _zeros_and_scales(qzeros, scales, index, column, columns, zero_words, inside, exponent, zero_offset, bits)
    return (_numbers(codes, exponent, 0, bits) - zero[None, :]) * scale[None, :]


@triton.jit
def _vector_kernel(
    inputs, qweight, qzeros, scales, outputs, inner, columns, zero_words,
    bits: tl.constexpr, group: tl.constexpr, zero_offset: tl.constexpr, block_n: tl.constexpr, chunks: tl.constexpr,
):  # fmt: skip
    """One row times `block_n` columns, `chunks` chunks of 32 inputs at a time."""
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    row = tl.program_id(1)
    exponent = _exponent(columns, bits)
    sums = tl.zeros((chunks, block_n), tl.float32)
    for first in range(0, inner // 32, chunks):
        chunk = first + tl.arange(0, chunks)
        exists = chunk * 32 < inner
        mask = exists[:, None] & (column < columns)[None, :]
        words = qweight + chunk[:, None] * (bits * columns) + column[None, :]
        index = chunk[:, None] * 32 // group
        zero, scale = _zeros_and_scales(
            qzeros, scales, index, column[None, :], columns, zero_words, mask, exponent, zero_offset, bits
        )
        products = tl.zeros((chunks, block_n), tl.float32)
        word = tl.zeros((chunks, block_n), tl.uint32)
        for place in tl.static_range(32):
            number, word = _next_numbers(words, word, exponent, place, columns, mask, bits)
            value = tl.load(inputs + row * inner + chunk * 32 + place, exists, 0).to(tl.float32)
            products += value[:, None] * (number - zero)
        sums += products * scale
    tl.store(outputs + row * columns + column, tl.sum(sums, 0).to(outputs.dtype.element_ty), column < columns)


@triton.jit
def _tiled_kernel(
    inputs, qweight, qzeros, scales, outputs, inner, columns, zero_words, rows, blocks_per_split,
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
    bits: tl.constexpr, group: tl.constexpr, zero_offset: tl.constexpr, block_n: tl.constexpr, chunks: tl.constexpr,
):  # fmt: skip
    """Write a tile of the weight (K, N): `chunks` chunks of 32 rows. A thread has eight columns, and stores them as 16 bytes."""
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)[None, :]
    chunk = tl.program_id(1) * chunks + tl.arange(0, chunks)[:, None]
    mask = (chunk * 32 < inner) & (column < columns)
    words, exponent = qweight + chunk * (bits * columns) + column, _exponent(columns, bits)
    zero, scale = _zeros_and_scales(
        qzeros, scales, chunk * 32 // group, column, columns, zero_words, mask, exponent, zero_offset, bits
    )
    place_out = weight + (chunk * 32).to(tl.int64) * columns + column  # a large head has more than 2^31 weights
    word = tl.zeros((chunks, block_n), tl.uint32)
    for place in tl.static_range(32):
        number, word = _next_numbers(words, word, exponent, place, columns, mask, bits)
        tl.store(place_out + place * columns, ((number - zero) * scale).to(weight.dtype.element_ty), mask)


class Launch(NamedTuple):
    """A kernel, its programs, what it is compiled for, and among how many programs K is shared."""

    kernel: triton.runtime.KernelInterface
    grid: tuple[int, int, int]
    sizes: dict[str, int]
    splits: int = 1


@cache
def product_launch(rows: int, inner: int, columns: int, bits: int, group: int) -> Launch:
    """Return the launch of a product with few rows."""
    if rows <= VECTOR_ROWS:
        width, chunks, warps = (32, 32, 8) if columns >= WIDE else (16, 128, 16)
        sizes = dict(block_n=width, chunks=chunks, num_warps=warps)
        return Launch(_vector_kernel, (_parts(columns, width), rows, 1), sizes)
    height, step = max(16, 1 << (rows - 1).bit_length()), _within_group(group)
    # codes that straddle words are loaded twice each: four stages would not fit the shared memory of consumer GPUs
    sizes = dict(block_m=height, block_n=64, block_k=step, num_stages=4 if 32 % bits == 0 else 2)
    wide, tall, steps = _parts(columns, 64), _parts(rows, height), _parts(inner, step)
    per_split = _parts(steps, max(1, min(PROGRAMS // (wide * tall), steps)))
    splits = _parts(steps, per_split)
    return Launch(_tiled_kernel, (wide, tall, splits), sizes | dict(rows=rows, blocks_per_split=per_split), splits)


@cache
def dense_launch(inner: int, columns: int) -> Launch:
    """Return the launch that writes the dense weight."""
    return Launch(_dense_kernel, (_parts(columns, 256), _parts(inner, 128), 1), dict(block_n=256, chunks=4))


def _within_group(group: int) -> int:
    return 64 if group % 64 == 0 else 32


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def gptq_matmul(
    inputs: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group: int, zero_offset: int
) -> Tensor:
    """(M, K) by packed (K, N) -> (M, N), summed in float32, in the dtype of the inputs."""
    (rows, inner), columns = inputs.shape, qweight.shape[1]
    most = TILED_ROWS if 32 % bits == 0 else STRADDLING_ROWS
    if inputs.dtype == torch.float32:  # it has no tensor cores: its tiles spill registers
        most = VECTOR_ROWS
    if rows > most:
        return inputs @ gptq_dense(qweight, qzeros, scales, inner, bits, group, zero_offset, inputs.dtype)
    if rows == 0:
        return inputs.new_empty(0, columns)
    kernel, grid, sizes, splits = product_launch(rows, inner, columns, bits, group)
    # sums of the splits are added afterwards, not atomically: the same inputs give the same bits
    outputs = inputs.new_empty(rows, columns) if splits == 1 else inputs.new_empty(splits, rows, columns, dtype=torch.float32)
    with torch.cuda.device_of(inputs):  # a launch goes to the current GPU, which need not be the layer's
        kernel[grid](
            inputs.contiguous(), qweight, qzeros, scales, outputs, inner, columns, qzeros.shape[1],
            bits=bits, group=group, zero_offset=zero_offset, **sizes,
        )  # fmt: skip
    return outputs if splits == 1 else outputs.sum(0).to(inputs.dtype)


def gptq_dense(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, inner: int, bits: int, group: int, zero_offset: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight (K, N) in a dtype: what `layer.dequantized(dtype).t()` is, bit for bit."""
    columns = qweight.shape[1]
    kernel, grid, sizes, _ = dense_launch(inner, columns)
    weight = qweight.new_empty(inner, columns, dtype=dtype)
    with torch.cuda.device_of(qweight):
        kernel[grid](
            qweight, qzeros, scales, weight, inner, columns, qzeros.shape[1],
            bits=bits, group=group, zero_offset=zero_offset, **sizes,
        )  # fmt: skip
    return weight


register_operator(gptq_matmul, lambda inputs, qweight, *others: inputs.new_empty(inputs.shape[0], qweight.shape[1]))
register_operator(
    gptq_dense,
    lambda qweight, qzeros, scales, inner, bits, group, zero_offset, dtype: qweight.new_empty(
        inner, qweight.shape[1], dtype=dtype
    ),
)
