# SPDX-License-Identifier: Apache-2.0
"""A weight beyond the end of a grid: its rounding takes no gradient, the scale that of the outermost number."""

import pytest
import torch

from hf_autoround.numerics import data_type
from hf_autoround.numerics.float_grid import FloatTunables
from hf_autoround.numerics.integer import IntegerTunables
from hf_autoround.numerics.quantized import dequantize
from hf_autoround.scheme import PRESETS, integer_scheme

ONE = torch.ones(1, 1, 1)
WEIGHTS = torch.tensor([[[-9.2, -8.4, -8.0, 0.3, 7.4, 7.6, 9.0]]])


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_beyond_the_ends_take_no_gradient(symmetric):
    zero_point = None if symmetric else 8 * ONE
    tunables = IntegerTunables(ONE, zero_point, torch.zeros_like(WEIGHTS).requires_grad_(), ONE.clone().requires_grad_())
    spec = integer_scheme(4, -1, symmetric).weight
    values = dequantize(data_type(spec).quantize(WEIGHTS, spec, tunables))
    assert values.flatten().tolist() == [-8, -8, -8, 0, 7, 7, 7]
    values.sum().backward()
    assert tunables.rounding.grad.flatten().tolist() == [0, 1, 1, 1, 1, 0, 0]
    # each weight's code, less the weight itself (in scales) where it is not clipped
    assert tunables.scale.grad.item() == pytest.approx(-8 + 0.4 + 0 - 0.3 - 0.4 + 7 + 7)


def test_floats_beyond_the_ends_take_no_gradient():
    spec = next(preset.weight for preset in PRESETS if preset.name == "NVFP4")
    weights = WEIGHTS * 0.75  # E2M1 ends at 6
    tunables = FloatTunables(ONE, ONE, torch.zeros_like(WEIGHTS).requires_grad_(), ONE.clone().requires_grad_())
    values = dequantize(data_type(spec).quantize(weights, spec, tunables))
    assert values.flatten().tolist() == [-6, -6, -6, 0, 6, 6, 6]
    values.sum().backward()
    assert tunables.rounding.grad.flatten().tolist() == [0, 0, 2, 0.5, 2, 2, 0]  # steps of the grid there
    assert tunables.scale.grad.item() == pytest.approx(-6 - 6 + 0 - 0.225 + 0.45 + 0.3 + 6, rel=1e-5)
