# SPDX-License-Identifier: Apache-2.0
"""Rounding with feedback: errors cancel along the directions or inputs, cost little elsewhere, and are those of GPTQ."""

import pytest
import torch

from hf_autoround.numerics import data_type, dequantize
from hf_autoround.numerics.feedback import _DAMPING, _WEIGHT, feedback, round_with_feedback, rounded_with_feedback
from hf_autoround.numerics.grouping import group, ungroup
from hf_autoround.numerics.integer import grid
from hf_autoround.scheme import integer_scheme, resolve_scheme


def case(spec, rows=24, columns=240, directions=5):
    """A weight, its searched numbers as they ship (the last group is shorter), and directions."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    groups = group(weight, spec.granularity)
    numbers = data_type(spec)
    quantized = numbers.quantize(groups, spec, numbers.search(groups, spec, None))
    return weight, numbers.freeze(quantized, spec), torch.randn(directions, columns, generator=generator)


def by_hessian(weight, quantized, spec, directions):
    """GPTQ as it is written everywhere: a Cholesky factor of the inverse Hessian."""
    basis = torch.linalg.qr(directions.t().double()).Q
    hessian = torch.eye(weight.shape[1], dtype=torch.double) + _WEIGHT * basis @ basis.t()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, codes = weight.double().clone(), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        step = quantized.scale[:, column // 32, 0].double()
        zero = 0 if quantized.zero_point is None else quantized.zero_point[:, column // 32, 0].double()
        codes[:, column] = (left[:, column] / step).round().add(zero).clamp(*grid(spec))
        error = (left[:, column] - (codes[:, column] - zero) * step) / factor[column, column]
        left[:, column:] -= error[:, None] * factor[column, column:]
    return codes


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4])
def test_errors_vanish_along_the_directions_and_grow_little_elsewhere(bits, sym):
    spec = integer_scheme(bits, 32, sym).weight
    weight, quantized, directions = case(spec)
    found = round_with_feedback(weight, quantized, spec, directions)
    low, high = grid(spec)
    assert found.elements.dtype == quantized.elements.dtype and low <= found.elements.min() and found.elements.max() <= high
    assert found.scale is quantized.scale and found.zero_point is quantized.zero_point
    nearest, error = (ungroup(dequantize(each), weight.shape[1]) - weight for each in (quantized, found))
    assert (error @ directions.t()).norm() < 0.5 * (nearest @ directions.t()).norm()
    assert error.norm() < 1.3 * nearest.norm()


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
def test_it_is_gptq_with_that_hessian(sym):
    spec = integer_scheme(3, 32, sym).weight
    weight, quantized, directions = case(spec)
    found = round_with_feedback(weight, quantized, spec, directions)
    assert ungroup(found.elements, weight.shape[1]).float().equal(by_hessian(weight, quantized, spec, directions))


def seen(columns, rows=400, seed=5):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ mixing + 0.3


def searched(name, columns=224, experts=()):
    """A weight in groups, its data type and spec, and searched tunables."""
    spec = name.weight if hasattr(name, "weight") else resolve_scheme(name).weight
    weight = torch.randn(*experts, 24, columns, generator=torch.Generator().manual_seed(3)) * 0.05
    groups, numbers = group(weight, spec.granularity), data_type(spec)
    return weight, groups, numbers, spec, numbers.search(groups, spec, None)


def outputs_change(numbers, groups, spec, tunables, weight, inputs):
    frozen = numbers.freeze(numbers.quantize(groups, spec, tunables), spec)
    return ((ungroup(dequantize(frozen), weight.shape[-1]) - weight) @ inputs.t()).norm(dim=(-2, -1))


SCHEMES = ["W2A16G32", "W4A16", "W8A16", "MXFP4", "MXFP8", "MXINT4", "NVFP4", "FPW8A16", integer_scheme(3, 32, False)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_outputs_change_less_in_every_data_type(scheme):
    weight, groups, numbers, spec, start = searched(scheme)
    inputs = seen(weight.shape[1])
    found = rounded_with_feedback(numbers, groups, spec, start, feedback([inputs]))
    nearest, error = (outputs_change(numbers, groups, spec, each, weight, inputs) for each in (start, found))
    assert error < 0.85 * nearest
    assert found.learned()["rounding"].abs().max() <= 0.5
    unseen = rounded_with_feedback(numbers, groups, spec, start, feedback([inputs[:0]]))
    assert not unseen.learned()["rounding"].any(), "nothing was seen, and yet something moved"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_frozen_numbers_are_resumed_as_they_were(scheme):
    weight, groups, numbers, spec, start = searched(scheme)
    found = rounded_with_feedback(numbers, groups, spec, start, feedback([seen(weight.shape[1])]))
    frozen = numbers.freeze(numbers.quantize(groups, spec, found), spec)
    assert not torch.equal(frozen.elements.float(), numbers.quantize(groups, spec, start).elements)
    resumed = numbers.resumed(groups, spec, frozen)
    assert torch.equal(numbers.quantize(groups, spec, resumed).elements, frozen.elements.float())
    assert resumed.learned()["rounding"].abs().max() <= 0.5


def test_it_is_gptq_with_the_inputs_hessian():
    weight, groups, numbers, spec, start = searched(integer_scheme(4, 32), columns=160)
    inputs = seen(160)
    found = rounded_with_feedback(numbers, groups, spec, start, feedback([inputs]))
    hessian = (inputs.t() @ inputs).double()
    hessian += _DAMPING * hessian.diagonal().mean() * torch.eye(160)
    order = hessian.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    left, wanted = weight.double()[:, order], torch.empty_like(weight)
    for place, column in enumerate(order):
        step = numbers.quantize(groups, spec, start).scale[:, column // 32, 0].double()
        exact = weight[:, column] / step
        code = (exact + (left[:, place] / step - exact).clamp(-0.5, 0.5)).round().clamp(*grid(spec))
        wanted[:, column] = code.float()
        left[:, place:] -= ((left[:, place] - code * step) / factor[place, place])[:, None] * factor[place, place:]
    codes = ungroup(numbers.quantize(groups, spec, found).elements, 160)
    assert (codes != wanted).float().mean() < 0.002  # float32 against float64


def test_experts_have_each_their_own_feedback():
    weight, groups, numbers, spec, start = searched("W4A16", columns=128, experts=(2,))
    inputs = [seen(128, seed=6), seen(128, seed=7)]
    found = rounded_with_feedback(numbers, groups, spec, start, feedback(inputs))
    for expert, rows in enumerate(inputs):
        nearest, error = (outputs_change(numbers, groups, spec, each, weight, rows)[expert] for each in (start, found))
        assert error < 0.85 * nearest


def test_shorter_spans_share_less():
    weight, groups, numbers, spec, start = searched("W4A16", columns=256)
    inputs = seen(256)
    errors = [
        outputs_change(numbers, groups, spec, each, weight, inputs)
        for each in (
            start,
            *(rounded_with_feedback(numbers, groups, spec, start, feedback([inputs], span)) for span in (96, 256)),
        )
    ]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("rows", [8, 64, 1000])
def test_what_few_inputs_show_by_chance_is_hardly_fitted(rows):
    weight, groups, numbers, spec, start = searched("W4A16", columns=256)
    inputs = seen(256, rows + 500)
    found = rounded_with_feedback(numbers, groups, spec, start, feedback([inputs[:rows]]))
    nearest, error = (outputs_change(numbers, groups, spec, each, weight, inputs[rows:]) for each in (start, found))
    assert error < (0.85 if rows == 1000 else 1.03) * nearest
