# SPDX-License-Identifier: Apache-2.0
"""Rounding with feedback: errors cancel along the directions, cost little elsewhere, and are those of GPTQ."""

import pytest
import torch

from hf_autoround.numerics import data_type, dequantize
from hf_autoround.numerics.feedback import _WEIGHT, round_with_feedback
from hf_autoround.numerics.grouping import group, ungroup
from hf_autoround.numerics.integer import grid
from hf_autoround.scheme import integer_scheme


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
