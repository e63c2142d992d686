# SPDX-License-Identifier: Apache-2.0
"""Causal attention from plain matrix products, for tuning in bfloat16 on a CPU.

torch's fused CPU attention spends more than half of a tuning step in its backward pass. A few hundred queries at a time,
each chunk against the keys up to its own end, the same sums take half of that (8 x 256 tokens, 8 heads of 16: 15 ms
against 36; 2 x 2048 tokens, 8 heads of 128: 562 against 719), and the upper triangle is never computed.

It is registered with transformers' attention interface, so a model's own forward calls it by name.

Shapes: B samples, N heads, K key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "hf_autoround_chunked"
CHUNK = 256  # queries at a time; measured best of 64 to 512 for 256 to 2048 tokens


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
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    scale = size**-0.5 if scaling is None else scaling
    future = torch.full((min(CHUNK, tokens),) * 2, float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    outputs = []
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        mask = F.pad(future[: end - start, : end - start], (start, 0))
        scores = torch.baddbmm(mask.expand(len(query), -1, -1), query[:, start:end], key[:, :end].transpose(1, 2), alpha=scale)
        outputs.append(F.softmax(scores, -1) @ value[:, :end])
    return torch.cat(outputs, 1).view(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None
