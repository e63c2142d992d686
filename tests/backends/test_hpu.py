# SPDX-License-Identifier: Apache-2.0
"""The Gaudi backend, with Intel's operator played by one that does what its documentation says."""

import pytest
import torch
from packed import packed_linear

from hf_autoround.backends.hpu import HPU
from hf_autoround.layouts import AWQ, GPTQ_V1, GPTQ_V2

GAUDI = torch.device("hpu")
INPUTS = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def operator(monkeypatch):
    def convert_from_uint4(words, scales, zeros, dtype):
        shifts = torch.arange(0, 32, 4)
        codes, zeros = (((part.unsqueeze(-1) >> shifts) & 15).flatten(1).to(dtype) for part in (words, zeros))
        size = len(codes) // len(scales)
        return (codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)

    monkeypatch.setattr(torch.ops.hpu, "convert_from_uint4", convert_from_uint4, raising=False)


@pytest.mark.parametrize("layout", [GPTQ_V1, GPTQ_V2, AWQ()], ids=lambda layout: layout.name)
@pytest.mark.parametrize("size", [-1, 32])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_a_product_and_its_gradient_are_the_references(sym, size, layout, operator):
    layer = packed_linear(4, size, sym, (40, 96), layout)
    weight, saved = layer.dequantized(), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    HPU().prepare(layer)
    inputs = INPUTS.clone().requires_grad_()
    outputs = HPU().forward(layer, inputs)
    torch.testing.assert_close(outputs, INPUTS @ weight.t() + layer.bias)
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, torch.ones(5, 40) @ weight)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "device", "reason"),
    [
        (packed_linear(4, 32, True, (40, 96)), torch.device("cpu"), "it runs on Gaudi (hpu), not on cpu"),
        (packed_linear(3, 32, True, (40, 96)), GAUDI, "it multiplies 4-bit integers, not 3-bit int"),
        (packed_linear(4, 32, True, (36, 96)), GAUDI, "it needs a multiple of 8 outputs, not 36"),
        (packed_linear(4, 64, True, (40, 96)), GAUDI, "it needs inputs in whole groups of 64, not 96"),
        (packed_linear(4, 32, True, (40, 96)), GAUDI, "it needs habana-torch-plugin"),
    ],
    ids=["device", "bits", "outputs", "groups", "package"],
)
def test_a_refusal_says_why(layer, device, reason):
    assert HPU().refuse(layer, device).startswith(reason)
