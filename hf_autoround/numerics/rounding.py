# SPDX-License-Identifier: Apache-2.0
"""Rounding that lets gradients through: what is rounded forward is the identity backward."""

from collections.abc import Callable

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, rounded):  # noqa: ANN001, ANN205
        return rounded(values)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        return gradient, None


def straight_through(values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `rounded(values)`; the gradient passes straight through."""
    return _StraightThrough.apply(values, rounded)


def round_to_bfloat16(values: Tensor) -> Tensor:
    """Return float32 values that bfloat16 holds exactly; the gradient passes straight through."""
    return straight_through(values, _to_bfloat16)


def within(values: Tensor, low: float, high: float) -> Tensor:
    """Return 1 where values lie between two bounds, 0 elsewhere and for NaN, int8: what a gradient is multiplied with.

    By a difference: comparing takes a CPU several times as long.
    """
    return values.clamp(low, high).sub_(values).bool().logical_not_().view(torch.int8)


def power_of_two_below(values: Tensor) -> Tensor:
    """Return 2^floor(log2 |v|) of float32 values: the exponent's bits alone; 0 for 0 and what is smaller than 2^-126."""
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32)


def _to_bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().float()
