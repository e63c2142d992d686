# SPDX-License-Identifier: Apache-2.0
"""The order in which torch's int4 kernel for CPUs wants its codes, measured: it differs from machine to machine.

torch packs blocks of rows. Within a block it goes column by column, and within a column each byte holds two rows. How many
rows make a block, and which two share a byte, depends on the vector width; packing rows that are numbered tells.

Shapes: N out features, K in features, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_CHUNK = 512  # rows packed at a time


@dataclass(frozen=True)
class Segment:
    """Some whole blocks: rows `first` to `last`, and their bytes (blocks, K, B / 2).

    `order` says which of a block's B rows lie in the low halves of the B / 2 bytes, then which lie in the high halves.
    """

    first: int
    last: int
    bytes: Tensor
    order: list[int]

    @property
    def in_order(self) -> bool:
        """Whether the rows of the low halves, then of the high halves, are simply all rows."""
        return self.order == list(range(len(self.order)))

    @property
    def back(self) -> list[int]:
        """Where each of a block's rows lies in `order`."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    def side(self, side: int) -> slice:
        """Return which of a block's rows lie in the low (0) or in the high (1) halves."""
        half = len(self.order) // 2
        rows = self.order[side * half : (side + 1) * half]
        return slice(rows[0], rows[-1] + 1, rows[1] - rows[0])


@dataclass(frozen=True)
class Int4Order:
    """This machine's order for a number of rows: that of whole blocks, and that of the rows after the last one."""

    block: list[int]
    rest: list[int]

    def segments(self, packed: Tensor, rows: int) -> Iterator[Segment]:
        """Cut packed codes (N, K / 2) into segments of at most `rows` rows, a multiple of 64; the rest is one segment."""
        size, columns = len(self.block), packed.shape[1] * 2
        whole = packed.shape[0] - len(self.rest)
        for first in range(0, whole, rows):
            last = min(first + rows, whole)
            yield Segment(first, last, packed[first:last].view(-1, columns, size // 2), self.block)
        if self.rest:
            yield Segment(whole, packed.shape[0], packed[whole:].view(1, columns, len(self.rest) // 2), self.rest)

    def pack(self, codes: Tensor) -> Tensor:
        """Return what torch's kernel reads, uint8 (N, K / 2), for codes 0 to 15 (N, K) uint8.

        The same as torch's own function, five times faster and without its four bytes for each code.
        """
        packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
        for part in self.segments(packed, _CHUNK):
            size = len(part.order)
            rows = codes[part.first : part.last].contiguous().view(len(part.bytes), size, -1)
            rows = rows if part.in_order else rows[:, part.order]
            part.bytes.copy_(transposed(rows[:, : size // 2] | (rows[:, size // 2 :] << 4)))
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the codes (N, K) uint8 that `pack` was given."""
        codes = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.uint8)
        for part in self.segments(packed, _CHUNK):
            both = transposed(part.bytes)
            rows = torch.cat([both & 15, both >> 4], 1)
            rows = rows if part.in_order else rows[:, part.back]
            codes[part.first : part.last].view(rows.shape).copy_(rows)
        return codes


def transposed(matrices: Tensor) -> Tensor:
    """Return contiguous bytes (blocks, R, C) as contiguous (blocks, C, R).

    A shuffle of channels that lie last is such a transposition, and takes half the time of a strided copy.
    """
    blocks, rows, columns = matrices.shape
    channels_last = matrices.view(1, blocks, 1, rows * columns).permute(0, 3, 1, 2)
    return torch.channel_shuffle(channels_last, rows).permute(0, 2, 3, 1).reshape(blocks, columns, rows)


def measured_order(rows: int) -> Int4Order | None:
    """Return the order for N rows, or None where it is none of this kind."""
    size = _block_rows()
    return None if size is None else Int4Order(_order(size), _order(rows % size) if rows % size else [])


@cache
def _block_rows() -> int | None:
    codes = (torch.arange(256 * 32) * 7 // 3 % 16).view(256, 32).to(torch.uint8)
    packed = _pack(codes)
    for size in (64, 32, 16):
        if torch.equal(Int4Order(_order(size), []).unpack(packed), codes):
            return size
    return None


@cache
def _order(rows: int) -> list[int]:
    """Pack rows that are numbered, a hexadecimal digit of the number at a time."""
    numbers = torch.arange(rows)[:, None].expand(rows, 32)
    found = torch.zeros(rows, dtype=torch.int32)
    for shift in (0, 4):
        column = _pack((numbers >> shift) & 15).view(32, rows // 2)[0]
        found |= torch.cat([column & 15, column >> 4]).int() << shift
    return found.tolist()


def _pack(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
