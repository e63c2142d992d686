# SPDX-License-Identifier: Apache-2.0
"""Rows of zeros change no product, no gradient, and what a product's inputs are said to be."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_autoround.layers.products import PadRows, WatchProducts

PRODUCTS = {
    "linear": lambda inputs, weight: F.linear(inputs, weight.t(), torch.ones(6)),
    "matmul": torch.matmul,
    "@": lambda inputs, weight: inputs @ weight,
    "mm": torch.mm,
    "addmm": lambda inputs, weight: torch.addmm(torch.ones(6), inputs, weight),
}


class Seen(TorchFunctionMode):
    """Records the rows of every 2-D product."""

    rows: list[int]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.addmm):
            self.rows.append(len(output))
        return output


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65])
def test_padded_products_give_the_same_numbers_and_gradients(product, rows):
    torch.manual_seed(0)
    inputs, weight = torch.randn(rows, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    expected = product(inputs, weight)
    gradients = torch.autograd.grad(expected.square().sum(), (inputs, weight))
    seen = Seen()
    seen.rows = []
    with seen, PadRows():
        found = product(inputs, weight)
    assert seen.rows == [-(-rows // 64) * 64]
    assert torch.allclose(found, expected, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found.square().sum(), (inputs, weight)), gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "product",
    [
        lambda: torch.randn(7, 5) @ torch.ones(3, 5, 6),
        lambda: torch.addmm(torch.ones(7, 6), torch.ones(7, 5), torch.ones(5, 6)),
        lambda: F.linear(torch.ones(2, 7, 5), torch.ones(6, 5)),
        lambda: torch.mm(torch.ones(7, 5), torch.ones(5, 6), out=torch.empty(7, 6)),
    ],
    ids=["many matrices", "rows added", "3-D inputs", "given memory"],
)
def test_other_products_are_left_alone(product):
    torch.manual_seed(0)
    expected = product()
    torch.manual_seed(0)
    with PadRows():
        assert torch.equal(product(), expected)


def test_who_watches_sees_no_padding():
    seen = []

    class Watcher(WatchProducts):
        def inputs_of(self, name, parameter, expert, inputs):
            seen.append((name, expert, tuple(inputs.shape)))
            return inputs

    experts = torch.randn(3, 6, 5)
    with PadRows(), Watcher({"experts": (experts, False)}):
        F.linear(torch.randn(7, 5), experts[2])
    assert seen == [("experts", 2, (7, 5))]
