# SPDX-License-Identifier: Apache-2.0
"""Dense streams of b-bit codes in 32-bit words, low bits first: what the GPTQ layouts are made of.

32 codes fill b words exactly, so every width from 1 to 8 goes through the same 32 shifts; codes may straddle words.
Widths that divide 8 go byte by byte, five times faster: layers are repacked while a checkpoint loads.

Floats of 4 bits are such codes: a sign and which of eight magnitudes.

Shapes: R rows, n codes per row, W = ceil(n b / 32) words per row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # so many bytes


def word_count(codes: int, bits: int) -> int:
    """Return the number of 32-bit words that hold a row of codes."""
    return -(-codes * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes (R, n) of any integer type into int32 words (R, W)."""
    rows, count = codes.shape
    if 8 % bits == 0:
        # as many codes as fit in a byte are one number, which is shifted over itself: its lowest byte then has all of them
        many = 8 // bits
        numbers = F.pad(codes.to(torch.uint8), (0, -count % (4 * many))).flatten().view(_WIDE[many])
        octets = numbers.clone()
        for place in range(1, many):
            octets |= numbers >> ((8 - bits) * place)
        return octets.to(torch.uint8).view(torch.int32).view(rows, word_count(count, bits))
    chunks = F.pad(codes, (0, -count % 32)).view(rows, -1, 32)
    words = torch.zeros(rows, chunks.shape[1], bits, dtype=torch.int64, device=codes.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        value = chunks[..., place].to(torch.int64)
        words[..., word] |= value << shift
        if shift + bits > 32:
            words[..., word + 1] |= value >> (32 - shift)
    return words.to(torch.int32).flatten(1)[:, : word_count(count, bits)].contiguous()


def pack_nibbles(values: Tensor, magnitudes: Tensor) -> Tensor:
    """Pack (R, n) numbers, each plus or minus one of eight magnitudes (in order), into bytes (R, n / 2): sign, then which."""
    numbers = values.float()
    codes = torch.bucketize(numbers.abs(), magnitudes.to(numbers.device)) + 8 * torch.signbit(numbers)
    return pack_bits(codes, 4).view(torch.uint8)


def unpack_nibbles(octets: Tensor, magnitudes: Tensor) -> Tensor:
    """Undo `pack_nibbles`: float32 numbers (R, n), -0 among them."""
    codes = torch.stack([octets & 15, octets >> 4], -1).flatten(1)
    return torch.cat([magnitudes, -magnitudes]).to(octets.device)[codes.int()]


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack int32 words (R, W) into uint8 codes (R, count)."""
    if 8 % bits == 0:
        octets = words.contiguous().view(torch.uint8)
        places = torch.empty(*octets.shape, 8 // bits, dtype=torch.uint8, device=words.device)
        for place in range(8 // bits):
            places[..., place] = (octets >> (bits * place)) & (2**bits - 1)
        return places.flatten(1)[:, :count]
    chunks = F.pad(words, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = torch.empty(*chunks.shape[:2], 32, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        value = chunks[..., word] >> shift  # arithmetic: the mask drops the copies of the sign
        if shift + bits > 32:
            value = (value & (2 ** (32 - shift) - 1)) | (chunks[..., word + 1] << (32 - shift))
        codes[..., place] = (value & mask).to(torch.uint8)
    return codes.flatten(1)[:, :count]
