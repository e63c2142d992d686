# SPDX-License-Identifier: Apache-2.0
"""Attention in chunks is attention, and so is its gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_autoround.models.attention import CHUNK, chunked_attention


@pytest.mark.parametrize("tokens", [5, CHUNK, 2 * CHUNK + 3])
def test_chunks_and_their_gradients_are_those_of_torchs_own_attention(tokens):
    torch.manual_seed(0)
    query = torch.randn(2, 4, tokens, 3, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, tokens, 3, dtype=torch.float64)
    weight = torch.randn(2, tokens, 4, 3, dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output, _ = chunked_attention(nn.Identity(), *leaves, None, scaling=0.7, is_causal=True)
    others = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*others, is_causal=True, scale=0.7, enable_gqa=True).transpose(1, 2)
    found = torch.autograd.grad(output, leaves, weight)
    wanted = torch.autograd.grad(expected, others, weight)
    for mine, theirs in zip((output, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_last_token_alone_attends_as_in_torchs_own_attention():
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, 1, 3), torch.randn(2, 2, 2, 7, 3)
    output, _ = chunked_attention(nn.Identity(), query, key, value, None, scaling=0.7, is_causal=True)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.7, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(output, expected)
