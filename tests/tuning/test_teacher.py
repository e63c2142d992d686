# SPDX-License-Identifier: Apache-2.0
"""The divergence and its gradient, chunk by chunk, are those of the whole."""

import pytest
import torch
from torch.nn import functional as F

from hf_autoround.tuning.teacher import backward, divergence


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_chunks_give_the_divergence_and_the_gradient_of_the_whole(rows, dtype):
    torch.manual_seed(0)
    hidden, target = torch.randn(2, 23, 8, dtype=dtype)
    mine, theirs = torch.randn(2, 11, 8, dtype=dtype)
    weight = mine.clone().requires_grad_()
    leaf = hidden.clone().requires_grad_()
    logs = F.log_softmax(leaf @ weight.t(), -1), F.log_softmax(target @ theirs.t(), -1)
    each = F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    expected = each.sum()
    (expected * 0.25).backward()
    head = mine.clone().requires_grad_()
    found, gradient = backward(lambda x: x @ head.t(), lambda x: x @ theirs.t(), hidden, target, rows, 0.25)
    some = sum(chunk[::16].mean() * len(chunk) for chunk in each.split(rows))
    close, rel = ({"rtol": 1e-4, "atol": 1e-6}, 1e-5) if dtype == torch.float32 else ({}, 1e-6)
    assert found.item() == pytest.approx(some.item(), rel=rel)
    assert torch.allclose(gradient, leaf.grad, **close) and torch.allclose(head.grad, weight.grad, **close)
    assert divergence(lambda x: x @ mine.t(), lambda x: x @ theirs.t(), hidden, target, rows).item() == pytest.approx(
        expected.item(), rel=rel
    )
