# SPDX-License-Identifier: Apache-2.0
"""How far the quantized model's predictions are from the float model's: KL(float || quantized), and its gradient.

The float model is remembered by its last hidden states, not by its logits, which would be a hundred times as large. Both
models' logits exist for a chunk of positions at a time.

Shapes: R positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # (R, H) -> (R, V)
_WATCHED = 4


def divergence(student: Logits, teacher: Logits, hidden: Tensor, target: Tensor, rows: int) -> Tensor:
    """Return the sum over positions of the KL divergence, float64.

    `hidden` and `target` (R, H) are what the two heads receive; `rows` of them are done at a time.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    with torch.no_grad():
        for mine, theirs in zip(hidden.split(rows), target.split(rows), strict=True):
            total += _divergence(student(mine), teacher(theirs))
    return total


def backward(student: Logits, teacher: Logits, hidden: Tensor, target: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the KL divergence over positions, and `scale` times its gradient for `hidden`, (R, H).

    The gradient needs no logarithm, so the divergence, which is there to be looked at, is estimated from every fourth
    position. What the student's head was built from gets its gradients as by `Tensor.backward`.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    gradient = torch.empty_like(hidden)
    for start in range(0, len(hidden), rows):
        leaf = hidden[start : start + rows].detach().requires_grad_()
        with torch.no_grad():
            theirs = teacher(target[start : start + rows])
        with torch.enable_grad():
            mine = student(leaf)
        precise = torch.promote_types(mine.dtype, torch.float32)
        p, q = (logits.detach().softmax(-1, dtype=precise) for logits in (theirs, mine))
        total += _divergence(mine.detach()[::_WATCHED], theirs[::_WATCHED]) * (len(p) / len(p[::_WATCHED]))
        mine.backward(q.sub_(p).mul_(scale).to(mine.dtype))  # d KL / d logits = q - p
        gradient[start : start + rows] = leaf.grad
    return total, gradient


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return sum p (log p - log q) for two tensors of logits (R, V)."""
    precise = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (logits.log_softmax(-1, dtype=precise) for logits in (teacher, student))
    return torch.dot(log_p.exp().flatten(), log_p.sub(log_q).flatten())
