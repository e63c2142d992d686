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


def divergence(student: Logits, teacher: Logits, hidden: Tensor, target: Tensor, rows: int) -> Tensor:
    """Return the sum over positions of the KL divergence, float64.

    `hidden` and `target` (R, H) are what the two heads receive; `rows` of them are done at a time.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    with torch.no_grad():
        for mine, theirs in zip(hidden.split(rows), target.split(rows), strict=True):
            kl, _, _ = _compare(student(mine), teacher(theirs))
            total += kl
    return total


def backward(
    student: Logits, teacher: Logits, hidden: Tensor, target: Tensor, rows: int, scale: float, chosen: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Return the sum of the KL divergence over positions, and `scale` times its gradient for `hidden`, (R, H).

    If only every nth position is `chosen`, these stand for all: both are estimates. What the student's head was built from
    gets its gradients as by `Tensor.backward`.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    gradient = torch.zeros_like(hidden)
    mine, theirs, found = hidden[chosen].detach(), target[chosen], gradient[chosen]
    weight = len(hidden) / len(mine)
    for start in range(0, len(mine), rows):
        leaf = mine[start : start + rows].requires_grad_()
        with torch.no_grad():
            expected = teacher(theirs[start : start + rows])
        with torch.enable_grad():
            logits = student(leaf)
        kl, p, q = _compare(logits.detach(), expected)
        logits.backward(q.sub_(p).mul_(scale * weight).to(logits.dtype))  # d KL / d logits = q - p
        total += kl
        found[start : start + rows] = leaf.grad
    return total * weight, gradient


def _compare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum p (log p - log q), p and q for two tensors of logits (R, V)."""
    precise = torch.promote_types(student.dtype, torch.float32)
    log_p = torch.log_softmax(teacher, -1, dtype=precise)
    log_q = torch.log_softmax(student, -1, dtype=precise)
    p = log_p.exp()
    kl = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
    return kl, p, log_q.exp_()
