# SPDX-License-Identifier: Apache-2.0
"""The divergence and its gradient, chunk by chunk, are those of the whole."""

import pytest
import torch
from torch.nn import functional as F

from hf_autoround.tuning.teacher import Heads, backward, divergence, evened


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["two heads", "one linear head"])
def test_chunks_give_the_divergence_and_the_gradient_of_the_whole(rows, dtype, linear):
    torch.manual_seed(0)
    hidden, target = torch.randn(2, 23, 8, dtype=dtype)
    mine, theirs = torch.randn(2, 11, 8, dtype=dtype)
    if linear:
        theirs = mine
    weight = mine.clone().requires_grad_()
    leaf = hidden.clone().requires_grad_()
    logs = F.log_softmax(leaf @ weight.t(), -1), F.log_softmax(target @ theirs.t(), -1)
    each = F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    expected = each.sum()
    (expected * 0.25).backward()
    head = mine.clone().requires_grad_()
    heads = Heads(lambda x: x @ head.t(), lambda x: x @ theirs.t(), linear)
    found, gradient = backward(heads, hidden, target, rows, 0.25)
    some = sum(chunk[::16].mean() * len(chunk) for chunk in each.split(rows))
    close, rel = ({"rtol": 1e-4, "atol": 1e-6}, 1e-5) if dtype == torch.float32 else ({}, 1e-6)
    assert found.item() == pytest.approx(some.item(), rel=rel)
    assert torch.allclose(gradient, leaf.grad, **close) and (linear or torch.allclose(head.grad, weight.grad, **close))
    assert divergence(heads, hidden, target, rows).item() == pytest.approx(expected.item(), rel=rel)


def test_large_logits_in_bfloat16_hide_no_small_difference():
    torch.manual_seed(0)
    weight, target = torch.randn(50, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    hidden = target + (0.01 * torch.randn(40, 16)).bfloat16()
    exact, expected = backward(Heads(*[lambda x: x @ weight.float().t()] * 2), hidden.float(), target.float(), 40, 1.0)

    def off(linear: bool) -> tuple[float, float]:
        found, gradient = backward(Heads(*[lambda x: x @ weight.t()] * 2, linear), hidden, target, 40, 1.0)
        return abs(found / exact - 1).item(), ((gradient - expected).norm() / expected.norm()).item()

    assert off(False)[0] > 20 * off(True)[0] and off(False)[1] > 20 * off(True)[1] and max(off(True)) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_position_pulls_where_it_did_with_the_root_of_its_force(dtype):
    gradient = torch.tensor([[3e-9, 4e-9], [0.0, 0.0], [-3.0, 4.0]], dtype=dtype)
    found = evened(gradient)
    assert found.dtype == dtype and torch.equal(found[1], gradient[1])
    assert torch.allclose(found.float().norm(dim=-1), gradient.float().norm(dim=-1).sqrt(), rtol=0.01)
    assert torch.allclose(F.normalize(found.float()), F.normalize(gradient.float(), eps=1e-30), atol=0.01)
