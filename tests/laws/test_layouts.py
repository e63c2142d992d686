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


INTEGERS = [integer_scheme(bits, size, sym) for bits in range(2, 9) for size in (-1, 32, 48) for sym in (True, False)]
OTHERS = [preset for preset in PRESETS if preset.weight is not None and preset.weight.data_type != "int"]
SPECS = list(dict.fromkeys(scheme.weight for scheme in INTEGERS + OTHERS))
KINDS = sorted({(spec.data_type, spec.bits, spec.symmetric) for spec in SPECS})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}{kind[1]}{'' if kind[2] else '-asym'}")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_unpacking_undoes_packing(layout, kind):
    tried = 0
    for shape in SHAPES:
        for spec in SPECS:
            if (spec.data_type, spec.bits, spec.symmetric) != kind or layout.refuse(spec, shape):
                continue
            dtype = data_type(spec)
            if dtype.refuse(spec, shape[1]):
                continue
            groups = group(torch.randn(shape, generator=torch.Generator().manual_seed(0)), spec.granularity)
            tensor = dtype.freeze(dtype.quantize(groups, spec, dtype.neutral(groups, spec)), spec)
            packed = layout.pack(tensor, spec, shape[1])
            assert {name: (tuple(part.shape), part.dtype) for name, part in packed.items()} == layout.empty(spec, shape)
            back = layout.unpack(packed, spec, shape)
            assert torch.equal(ungroup(dequantize(back), shape[1]), ungroup(dequantize(tensor), shape[1]))
            assert back.elements.dtype == tensor.elements.dtype and torch.equal(back.scale.float(), tensor.scale.float())
            tried += 1
    assert tried or kind[0] not in layout.data_types or layout.name == "awq"


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
