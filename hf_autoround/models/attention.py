# SPDX-License-Identifier: Apache-2.0
"""Causal attention from plain matrix products, for tuning in bfloat16 and for writing text on a CPU.

torch's fused CPU attention spends more than half of a tuning step in its backward pass. A hundred queries at a time, each
chunk against the keys up to its own end, the same sums take a third or half of that (8 x 256 tokens, 8 heads of 16: 16 ms
against 62 with AMX), and most of the upper triangle is never computed. The backward is written by hand because autograd
makes each chunk's gradient as long as all keys (2048 tokens, 8 heads of 128: 211 ms against 262).

It is registered with transformers' attention interface, so a model's own forward calls it by name.

Shapes: B samples, N heads, K key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "hf_autoround_chunked"
CHUNK = 128  # queries at a time; measured best of 64 to 256 for 256 to 2048 tokens, or near it


def use_chunked_attention(model: PreTrainedModel) -> None:
    """Let a model that would use torch's fused attention use this one; others (sinks, soft caps) stay as they are."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, chunked_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def chunked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend: query (B, N, T, D), key and value (B, K, T, D) -> (B, T, N, D).

    Whatever is not plain causal self-attention goes to transformers' own function.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unusual = dropout or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if query.shape[2] == 1 and attention_mask is None and not unusual:
        return _one_query(query, key, value, scaling), None
    if attention_mask is not None or not causal or unusual or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    batch, heads, tokens, size = query.shape
    repeats = heads // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = size**-0.5 if scaling is None else scaling
    output = _Causal.apply(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), scale)
    return output.view(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def _one_query(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attend with the last token alone, (B, N, 1, D), to all so far: (B, 1, N, D). Of 256 rows at once it takes half of the
    time of torch's own."""
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], -1, size)
    shares = torch.softmax(grouped @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling), -1)
    return (shares @ value).view(batch, 1, heads, -1)


class _Causal(torch.autograd.Function):
    """softmax(scale * query key^T) value, each query with the keys up to itself: (B*N, T, D) each."""

    @staticmethod
    def forward(ctx, query, key, value, scale):  # noqa: ANN001, ANN205
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        future = torch.full((CHUNK, CHUNK), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
        nothing, chunks = query.new_zeros(1, 1, 1), []  # added zero times: baddbmm is here for its factor alone
        for start, end in _chunks(query):
            shares = torch.baddbmm(nothing, query[:, start:end], key[:, :end].transpose(1, 2), beta=0, alpha=scale)
            shares[:, :, start:] += future[: end - start, : end - start]
            torch.softmax(shares, -1, out=shares)
            output[:, start:end] = shares @ value[:, :end]
            if any(ctx.needs_input_grad):
                chunks.append(shares)
        ctx.save_for_backward(query, key, value, *chunks)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        query, key, value, *chunks = ctx.saved_tensors
        for_query, for_key, for_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (start, end), shares in zip(_chunks(query), chunks, strict=True):
            own = gradient[:, start:end]
            for_value[:, :end].baddbmm_(shares.transpose(1, 2), own)
            for_shares = own @ value[:, :end].transpose(1, 2)
            for_scores = torch._softmax_backward_data(for_shares, shares, -1, shares.dtype)
            for_query[:, start:end] = for_scores @ key[:, :end]
            for_key[:, :end].baddbmm_(for_scores.transpose(1, 2), query[:, start:end])
        return for_query.mul_(ctx.scale), for_key.mul_(ctx.scale), for_value, None


def _chunks(query: Tensor) -> list[tuple[int, int]]:
    """Return where each chunk of queries starts and ends."""
    tokens = query.shape[1]
    return [(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]
