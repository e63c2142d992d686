# SPDX-License-Identifier: Apache-2.0
"""How good a model is: perplexity on rows of tokens.

Shapes: N rows, T tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokens: Tensor, batch_size: int = 8) -> float:
    """Return exp of the mean negative log-likelihood of every token of each row (N, T) but the first."""
    total, count = 0.0, 0
    for rows in tokens.split(batch_size):
        rows = rows.to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    return math.exp(total / count)
