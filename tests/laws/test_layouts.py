# SPDX-License-Identifier: Apache-2.0
"""Laws of every layout: unpacking undoes packing, and what will be written is known beforehand."""

import pytest
import torch

from hf_autoround.layouts import LAYOUTS
from hf_autoround.layouts.bits import pack_bits, unpack_bits
from hf_autoround.numerics import data_type, dequantize
from hf_autoround.numerics.grouping import group, ungroup
from hf_autoround.scheme import PRESETS, integer_scheme

SHAPES = [(32, 64), (40, 100), (7, 33), (64, 31), (200, 256)]
SPECS = [integer_scheme(bits, size, sym).weight for bits in range(2, 9) for size in (-1, 32, 48) for sym in (True, False)]
SPECS += [preset.weight for preset in PRESETS if preset.weight is not None and preset.weight.data_type != "int"]


def shapes(layout, spec):
    return [shape for shape in SHAPES if layout.refuse(spec, shape) is None and data_type(spec).refuse(spec, shape[1]) is None]


CASES = [(layout, spec) for layout in LAYOUTS for spec in dict.fromkeys(SPECS) if shapes(layout, spec)]


def name(value):
    if hasattr(value, "name"):
        return value.name
    return f"{value.data_type}{value.bits}-g{value.group_size}-{'sym' if value.symmetric else 'asym'}"


@pytest.mark.parametrize(("layout", "spec"), CASES, ids=name)
def test_unpacking_undoes_packing(layout, spec):
    dtype = data_type(spec)
    for shape in shapes(layout, spec):
        groups = group(torch.randn(shape, generator=torch.Generator().manual_seed(0)), spec.granularity)
        tensor = dtype.freeze(dtype.quantize(groups, spec, dtype.neutral(groups, spec)), spec)
        packed = layout.pack(tensor, spec, shape[1])
        assert {name: (tuple(part.shape), part.dtype) for name, part in packed.items()} == layout.empty(spec, shape)
        back = layout.unpack(packed, spec, shape)
        assert torch.equal(ungroup(dequantize(back), shape[1]), ungroup(dequantize(tensor), shape[1]))
        assert (back.elements.dtype, back.scale.dtype) == (tensor.elements.dtype, tensor.scale.dtype)
        assert torch.equal(back.scale.float(), tensor.scale.float())  # torch cannot compare 8-bit floats


def test_every_layout_stores_something():
    assert {layout.name for layout, _ in CASES} == {layout.name for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_refusal_is_the_end_of_a_sentence(layout):
    reasons = [layout.refuse(spec, shape) for spec in SPECS for shape in SHAPES]
    for reason in filter(None, reasons):
        assert reason.startswith(("it ", "its ")) and not reason.endswith(".")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_bit_streams_are_little_endian_and_dense(bits, count):
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    words = pack_bits(codes, bits)
    stream = [sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row)) for row in words]
    for row, number in zip(codes.tolist(), stream, strict=True):
        assert [(number >> (bits * place)) & (2**bits - 1) for place in range(count)] == row
    assert torch.equal(unpack_bits(words, bits, count), codes.to(torch.uint8))
