# SPDX-License-Identifier: Apache-2.0
"""The backend that runs everywhere compiles into one graph (Triton's is tested in `triton_laws.py`)."""

import pytest
import torch
from packed import packed_linear

from hf_autoround.layouts import AWQ, GPTQ_V1


@pytest.mark.parametrize(("layout", "bits"), [*((GPTQ_V1, bits) for bits in range(2, 9)), (AWQ(), 4)], ids=str)
def test_the_reference_compiles_into_one_graph_with_its_gradient(layout, bits):
    layer = packed_linear(bits, 32, False, (24, 64), layout)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (compiled, layer):
        inputs = torch.ones(3, 64, requires_grad=True)
        module(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients)
