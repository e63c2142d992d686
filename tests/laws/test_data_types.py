# SPDX-License-Identifier: Apache-2.0
"""Laws of every data type: what ships is what was tuned, gradients arrive, the grid is a fixed point."""

import pytest
import torch

from hf_autoround.numerics import DATA_TYPES, data_type, dequantize
from hf_autoround.numerics.grouping import group, over_rows, ungroup
from hf_autoround.scheme import PRESETS, PerBlock, PerGroup, TensorSpec, integer_scheme

SPECS = [integer_scheme(bits, size, sym).weight for bits in range(2, 9) for size in (-1, 32, 48) for sym in (True, False)]
SPECS += [
    TensorSpec(spec.data_type, spec.bits, spec.granularity, spec.symmetric)
    for preset in PRESETS
    for spec in (preset.weight, preset.activation)
    if spec is not None and spec.data_type != "int"
]
SPECS += [TensorSpec("fp", 8, granularity, True) for granularity in (PerGroup(32), PerBlock(16, 32))]
CASES = [(dtype, spec) for dtype in DATA_TYPES for spec in dict.fromkeys(SPECS) if spec.data_type == dtype.name]


def name(value):
    return value.name if hasattr(value, "name") else f"{value.bits}b-g{value.group_size}-{'sym' if value.symmetric else 'asym'}"


@pytest.fixture
def weight(spec):
    columns = 80 if data_type(spec).refuse(spec, 80) is None else 96  # where it goes, the last group is short
    return torch.randn(24, columns, generator=torch.Generator().manual_seed(1)) * 0.05


def test_every_data_type_is_tested():
    assert {dtype.name for dtype, _ in CASES} == {dtype.name for dtype in DATA_TYPES}


def moved(tunables):
    """Tunables that are not neutral, as tuning leaves them."""
    generator = torch.Generator().manual_seed(2)
    learned = {
        part: (tensor + (torch.rand(tensor.shape, generator=generator) - 0.5) * 0.3).requires_grad_()
        for part, tensor in tunables.learned().items()
    }
    return tunables.with_learned(learned)


@pytest.mark.parametrize(("dtype", "spec"), CASES, ids=name)
def test_what_ships_equals_what_was_tuned(dtype, spec, weight):
    groups = group(weight, spec.granularity)
    quantized = dtype.quantize(groups, spec, moved(dtype.neutral(groups, spec)))
    assert torch.equal(dequantize(dtype.freeze(quantized, spec)), dequantize(quantized).detach())


@pytest.mark.parametrize(("dtype", "spec"), [case for case in CASES if case[1].data_type == "int"], ids=name)
def test_integer_scales_are_the_same_in_an_engine_that_keeps_them_in_bfloat16(dtype, spec, weight):
    groups = group(weight, spec.granularity)
    for tunables in (moved(dtype.neutral(groups, spec)), dtype.search(groups, spec, None)):
        scale = dtype.freeze(dtype.quantize(groups, spec, tunables), spec).scale
        assert scale.dtype == torch.float16 and torch.equal(scale.bfloat16().half(), scale)


@pytest.mark.parametrize(("dtype", "spec"), CASES, ids=name)
def test_gradients_reach_everything_that_is_learned(dtype, spec, weight):
    groups = group(weight, spec.granularity)
    tunables = moved(dtype.neutral(groups, spec))
    (dequantize(dtype.quantize(groups, spec, tunables)) - groups).square().sum().backward()
    for part, tensor in tunables.learned().items():
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, part


@pytest.mark.parametrize(("dtype", "spec"), [case for case in CASES if case[1].data_type == "int"], ids=name)
def test_a_scale_as_small_as_there_is_may_grow(dtype, spec, weight):
    groups = group(weight * 1e-6, spec.granularity)
    tunables = moved(dtype.neutral(groups, spec))
    (dequantize(dtype.quantize(groups, spec, tunables)) - groups).square().sum().backward()
    assert (tunables.scale.grad != 0).any()


@pytest.mark.parametrize(("dtype", "spec"), CASES, ids=name)
def test_rounding_takes_a_weight_no_further_than_its_neighbours(dtype, spec, weight):
    tunables = dtype.neutral(group(weight, spec.granularity), spec)
    tunables.rounding.add_(0.7).mul_(torch.sign(group(weight, spec.granularity)))
    tunables.clamp_()
    assert torch.equal(tunables.rounding.abs().unique()[-1:], torch.tensor([0.5]))


@pytest.mark.parametrize(("dtype", "spec"), CASES, ids=name)
def test_quantizing_a_dequantized_weight_changes_nothing(dtype, spec, weight):
    groups = group(weight, spec.granularity)
    tunables = dtype.neutral(groups, spec)
    once = dequantize(dtype.quantize(groups, spec, tunables))
    assert torch.equal(dequantize(dtype.quantize(once, spec, tunables)), once)


@pytest.mark.parametrize(("dtype", "spec"), CASES, ids=name)
def test_the_search_is_never_worse_than_round_to_nearest(dtype, spec, weight):
    groups = group(weight, spec.granularity)
    importance = group(torch.rand(1, weight.shape[1], generator=torch.Generator().manual_seed(3)) ** 4 + 1e-3, spec.granularity)

    def error(tunables):
        errors = (dequantize(dtype.quantize(groups, spec, tunables)) - groups).square() * importance
        return over_rows(errors.sum(-1, keepdim=True), spec.granularity, lambda rows: rows.sum(-3, keepdim=True))

    before, after = error(dtype.neutral(groups, spec)), error(dtype.search(groups, spec, importance))
    assert (after <= before * (1 + 1e-5)).all()
    if spec.bits <= 4:
        assert after.sum() < 0.97 * before.sum()


COMPILED = [integer_scheme(bits, 32, sym).weight for bits in (2, 4) for sym in (True, False)]
COMPILED += [preset.weight for preset in PRESETS if preset.name in ("MXFP4", "NVFP4", "FP8_BLOCK")]


@pytest.mark.parametrize("spec", COMPILED, ids=name)
def test_a_compiled_quantizer_gives_the_same_bits(spec, weight):
    dtype = data_type(spec)
    groups = group(weight, spec.granularity)
    tunables = moved(dtype.neutral(groups, spec))
    # without emulated casts inductor drops the scale's way through float16
    compiled = torch.compile(
        lambda: dequantize(dtype.quantize(groups, spec, tunables)), options={"emulate_precision_casts": True}, dynamic=False
    )
    assert torch.equal(compiled(), dequantize(dtype.quantize(groups, spec, tunables)))


@pytest.mark.parametrize(("dtype", "spec"), CASES, ids=name)
def test_groups_of_zeros_stay_zero(dtype, spec):
    groups = group(torch.zeros(4, 64), spec.granularity)
    for tunables in (dtype.neutral(groups, spec), dtype.search(groups, spec, None)):
        assert torch.equal(dequantize(dtype.quantize(groups, spec, tunables)), groups)


def test_the_largest_weight_falls_on_the_code_without_a_twin():
    spec = integer_scheme(4, -1, True).weight
    dtype = data_type(spec)
    groups = group(torch.tensor([[0.1, -0.2, 0.8], [0.1, -0.8, 0.2]]), spec.granularity)
    frozen = dtype.freeze(dtype.quantize(groups, spec, dtype.neutral(groups, spec)), spec)
    assert frozen.elements[0, 0, 2] == -8 and frozen.elements[1, 0, 1] == -8
    assert frozen.scale[0] < 0 < frozen.scale[1]


@pytest.mark.parametrize("columns", [64, 80, 7])
@pytest.mark.parametrize("size", [-1, 32, 48])
def test_ungroup_undoes_group(columns, size):
    granularity = integer_scheme(4, size).weight.granularity
    weight = torch.randn(2, 5, columns)
    assert torch.equal(ungroup(group(weight, granularity), columns), weight)
