# SPDX-License-Identifier: Apache-2.0
"""How far the quantized model's predictions are from the float model's: KL(float || quantized), and its gradient.

The float model is remembered by its last hidden states, not by its logits, which would be a hundred times as large. Both
models' logits exist for a chunk of positions at a time.

Shapes: R positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # (R, H) -> (R, V)
_WATCHED = 16
_CACHED = 1 << 17  # logits that stay in a CPU's cache


@dataclass(frozen=True)
class Heads:
    """The quantized model's head and the float model's; `linear` if both are one linear function, which is not learned.

    Then the quantized model's logits are the float model's plus those of the difference of the hidden states. A product in
    bfloat16 rounds large logits more than half as far as 4 bits move them: of the float model that alone is a KL divergence
    of 3e-5 on opt-wiki, where W4A16 ends at 9e-5.
    """

    student: Logits
    teacher: Logits
    linear: bool = False

    def of_student(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the quantized model's logits (R, V); if `linear`, what they add to the float model's. Differentiable."""
        return self.student(hidden - target.to(hidden) if self.linear else hidden)


def divergence(heads: Heads, hidden: Tensor, target: Tensor, rows: int) -> Tensor:
    """Return the sum over positions of the KL divergence, float64.

    `hidden` and `target` (R, H) are what the two heads receive; `rows` of them are done at a time.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    with torch.no_grad():
        for mine, theirs in zip(hidden.split(rows), target.split(rows), strict=True):
            total += _divergence(heads.of_student(mine, theirs), heads.teacher(theirs), heads.linear)
    return total


def backward(heads: Heads, hidden: Tensor, target: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the KL divergence over positions, and `scale` times its gradient for `hidden`, (R, H).

    The gradient needs no logarithm, so the divergence, which is there to be looked at, is estimated from every sixteenth
    position. What the student's head was built from gets its gradients as by `Tensor.backward`, unless the heads are `linear`.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    gradient = torch.empty_like(hidden)
    for start in range(0, len(hidden), rows):
        leaf = hidden[start : start + rows].detach().requires_grad_()
        with torch.no_grad():
            theirs = heads.teacher(target[start : start + rows])
        with torch.enable_grad():
            mine = heads.of_student(leaf, target[start : start + rows])
        logits = mine.detach()
        total += _divergence(logits[::_WATCHED], theirs[::_WATCHED], heads.linear) * (len(logits) / len(logits[::_WATCHED]))
        for place, other in _pieces(theirs, logits):
            p, q = _precise(place, other, heads.linear)
            p, q = (torch.softmax(each, -1, out=each) for each in (p, q))
            torch.mul(q.sub_(p), scale, out=place)  # d KL / d logits = q - p, where the teacher's logits were
        mine.backward(theirs.to(mine.dtype))
        gradient[start : start + rows] = leaf.grad
    return total, gradient


def evened(gradient: Tensor) -> Tensor:
    """Return gradients (..., H) of positions, each as long as the square root of what it was.

    A few positions, far from the float model, have most of the divergence and of its gradient, and which of them a batch holds
    is much of the noise of a step. So each pulls about as if its divergence counted by its power 3/4, and the mean of
    the divergence itself ends 1 to 3 % smaller (benchmarks/README.md). A head that is learned has its gradient as it is.
    """
    length = gradient.float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (gradient * length.rsqrt()).to(gradient.dtype)


def error(heads: Heads, hidden: Tensor, target: Tensor, rows: int) -> Tensor:
    """Return the mean KL divergence over positions: exact, or `backward`'s estimate if `hidden` (R, H) needs a gradient."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return divergence(heads, hidden, target, rows) / len(hidden)
    total, gradient = backward(heads, hidden, target, rows, 1 / len(hidden))
    return _KnownGradient.apply(hidden, total / len(hidden), gradient)


class _KnownGradient(torch.autograd.Function):
    """A number whose gradient for `hidden` is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None


def _divergence(student: Tensor, teacher: Tensor, adds: bool) -> Tensor:
    """Return sum p (log p - log q) for two tensors of logits (R, V), float64; `adds`: the student's add to the teacher's."""
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for theirs, mine in _pieces(teacher, student):
        log_p, log_q = (torch.log_softmax(each, -1, out=each) for each in _precise(theirs, mine, adds))
        total += torch.dot(log_p.exp().flatten(), log_q.neg_().add_(log_p).flatten())
    return total


def _pieces(teacher: Tensor, student: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same rows of both, as many as stay in a CPU's cache in float32: then a step's elementwise work takes half
    as long (2048 x 2048 logits)."""
    rows = max(1, _CACHED // teacher.shape[-1]) if teacher.device.type == "cpu" else len(teacher)
    return zip(teacher.split(rows), student.split(rows), strict=True)


def _precise(teacher: Tensor, student: Tensor, adds: bool) -> tuple[Tensor, Tensor]:
    """Return both logits in float32 at least, the student's with the teacher's added if `adds`; copies to be overwritten, as
    fresh memory costs a CPU more than exponentials do."""
    theirs, mine = (each.to(torch.promote_types(each.dtype, torch.float32), copy=True) for each in (teacher, student))
    return theirs, mine.add_(theirs) if adds else mine
