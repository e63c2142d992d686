# SPDX-License-Identifier: Apache-2.0
"""Rounding whose errors cancel in a layer's outputs: GPTQ (https://arxiv.org/abs/2210.17323).

Rounding to nearest is best for inputs that point anywhere. Where some directions matter more than others, a row's error
along them can be made small at the price of a little more error elsewhere: each column is rounded after it has made good
its share of what the columns before it got wrong. Two Hessians: that of inputs that were seen (`feedback`), for any data
type; and, for integers onto which an adapter is merged, 1 + `_WEIGHT` times the projection on the directions that it reads,
whose low rank replaces the Cholesky factor of an I x I matrix by a solve of R x R. The first moves numbers within half a step,
as tuning can take that up; the second either way, as merged weights lie on the grid but for a little: by the first the
error along the directions would be 11 to 23 % larger (24 x 240 random weights, 2 and 4 bits).

Shapes: E experts, O out features, I in features, G groups, S group size, R directions or sampled inputs, K columns of a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_autoround.numerics.base import DataType
from hf_autoround.numerics.integer import grid
from hf_autoround.numerics.quantized import QuantizedTensor, dequantize
from hf_autoround.numerics.tunables import Tunables
from hf_autoround.scheme import TensorSpec

SPAN = 4096  # columns that share their errors, at most: a factor of so many rows and columns has to be held
_DAMPING = 0.1  # of the mean squared input, and as many times that as rows are fewer than columns: chance is not to be fitted
_TOGETHER = 64  # columns after which those far behind are told of the errors
_REACH = 0.4999  # steps that a number may move: not to half a step, or one that lies on the grid would move
_WEIGHT = 100.0  # how much more an error along the directions counts


@torch.no_grad()
def round_with_feedback(weight: Tensor, quantized: QuantizedTensor, spec: TensorSpec, directions: Tensor) -> QuantizedTensor:
    """Return `quantized` (elements (O, G, S), integers) with elements that are rounded anew from `weight` (O, I).

    `directions` are (R, I); only the space they span matters.
    """
    size = quantized.elements.shape[-1]
    scale, (low, high) = dequantize(quantized.scale).double(), grid(spec)
    basis = torch.linalg.qr(directions.t().double()).Q  # (I, R)
    ahead = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device) + _WEIGHT * basis.t() @ basis
    wrong = torch.zeros(weight.shape[0], basis.shape[1], dtype=basis.dtype, device=basis.device)  # so far, along the basis
    codes = torch.empty(weight.shape[1], weight.shape[0], device=weight.device)
    for column, values in enumerate(weight.t().double()):
        step = scale[:, column // size, 0]
        zero = 0 if quantized.zero_point is None else quantized.zero_point[:, column // size, 0].double()
        # the columns ahead share what is wrong: this one's part is its least-squares weight among them
        aim = values - _WEIGHT * (wrong @ torch.linalg.solve(ahead, basis[column]))
        code = torch.div(aim, step).round_().add_(zero).clamp_(low, high)
        codes[column] = code
        wrong.addr_((code - zero) * step - values, basis[column])
        ahead.addr_(basis[column], basis[column], alpha=-_WEIGHT)
    elements = F.pad(codes.t(), (0, -codes.shape[0] % size)).unflatten(-1, (-1, size))
    return replace(quantized, elements=elements.to(quantized.elements.dtype))


@dataclass(frozen=True)
class Feedback:
    """How the errors of a span of columns are shared out: columns are rounded in the `order` (K,), and each leaves `shares`
    ([E,] K, K), a row for each, of its error to those that come later."""

    order: Tensor
    shares: Tensor


@torch.no_grad()
def feedback(inputs: Sequence[Tensor], span: int = SPAN) -> list[Feedback]:
    """Return how errors are shared out so that the outputs on `inputs` change little, for each span of columns.

    `inputs` are one (R, I), or one for each expert of fused ones, whose columns then have one order. The columns with the largest
    inputs come first. Without any inputs nothing is shared: that is rounding to nearest.
    """
    found = []
    for begin in range(0, inputs[0].shape[-1], span):
        columns = [rows[:, begin : begin + span].float() for rows in inputs]
        hessian = torch.stack([rows.t() @ rows for rows in columns])
        size = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        hessian.div_(size.where(size > 0, 1.0))
        order = hessian.diagonal(dim1=-2, dim2=-1).sum(0).argsort(descending=True, stable=True)
        backwards = order.flip(0)
        precise = torch.float32 if hessian.device.type == "mps" else torch.float64
        hessian = hessian[:, backwards[:, None], backwards].to(precise)
        damping = [_DAMPING * max(1, len(order) / len(rows)) if len(rows) else 1.0 for rows in columns]
        hessian.diagonal(dim1=-2, dim2=-1).add_(torch.tensor(damping, device=hessian.device)[:, None])
        # H = V V' with V upper triangular; its inverse is what GPTQ takes from a factor of H's inverse
        upper = torch.linalg.cholesky(hessian).flip(-2, -1)
        eye = torch.eye(len(order), dtype=upper.dtype, device=upper.device).expand_as(upper)
        factor = torch.linalg.solve_triangular(upper, eye, upper=True)
        shares = (factor / -factor.diagonal(dim1=-2, dim2=-1)[..., None]).float()
        found.append(Feedback(order, shares if len(inputs) > 1 else shares[0]))
    return found


@torch.no_grad()
def rounded_with_feedback(
    numbers: DataType, groups: Tensor, spec: TensorSpec, tunables: Tunables, spans: Sequence[Feedback]
) -> Tunables:
    """Return `tunables` for the groups ([E,] O, G, S) with a rounding that lets errors cancel.

    No number moves farther than to the next but nearest one: what rounding within half a step can reach.
    """
    weight, rounding, size = groups.flatten(-2), torch.zeros_like(groups).flatten(-2), groups.shape[-1]
    scales = tunables.with_learned({"rounding": weight.new_zeros(1, 1, 1)})
    begin = 0
    for span in spans:
        order = begin + span.order
        exact = weight[..., order].mT.contiguous()  # ([E,] K, O)
        aims, moves = exact.clone(), torch.empty_like(exact)
        for first in range(0, len(order), _TOGETHER):
            behind = min(first + _TOGETHER, len(order))
            own = scales.at(order[first:behind] // size)
            values = [_rounded(numbers, exact[..., first:behind, :], spec, own, by) for by in (-_REACH, 0.0, _REACH)]
            least, near, most = values[0].minimum(values[2]), values[1], values[0].maximum(values[2])
            below, above = (least + near) / 2, (near + most) / 2
            wrong = torch.empty_like(near)
            for place in range(behind - first):  # few operations, or these many steps take a GPU long
                aim, after = aims[..., first + place, :], slice(first + place + 1, behind)
                value = torch.where(aim < below[..., place, :], least[..., place, :], near[..., place, :])
                value = torch.where(aim > above[..., place, :], most[..., place, :], value)
                torch.sub(aim, value, out=wrong[..., place, :])
                aims[..., after, :].addcmul_(span.shares[..., first + place, after, None], wrong[..., place, None, :])
            aims[..., behind:, :] += span.shares[..., first:behind, behind:].mT @ wrong
            decided = aims[..., first:behind, :]
            moved = ((decided > above) & (most > near)).float() - ((decided < below) & (least < near)).float()
            moves[..., first:behind, :] = moved * (values[2] - values[0]).sign() * _REACH  # of a scale below zero the other way
        rounding[..., order] = moves.mT
        begin += len(order)
    return tunables.with_learned({"rounding": rounding.view_as(groups)})


def _rounded(numbers: DataType, columns: Tensor, spec: TensorSpec, tunables: Tunables, by: float) -> Tensor:
    """Return the values that columns (..., K, O), each with the tunables of its group, get with `by` added before rounding."""
    exact = columns.mT[..., None]
    rounding = tunables.with_learned({"rounding": torch.full_like(exact, by)})
    return dequantize(numbers.quantize(exact, spec, rounding))[..., 0].mT.contiguous()
