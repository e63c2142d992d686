# SPDX-License-Identifier: Apache-2.0
"""Rounding whose errors cancel along given input directions.

Rounding to nearest is best for inputs that point anywhere. Where some directions matter more than others (those that an
adapter reads), a row's error along them can be made to vanish at the price of a little more error elsewhere: each column
is rounded after it has made good its share of what the columns before it got wrong. It is GPTQ
(https://arxiv.org/abs/2210.17323) with the Hessian 1 + `_WEIGHT` times the projection on the directions, whose low rank
replaces the Cholesky factor of an I x I matrix by a solve of R x R.

Shapes: O out features, I in features, G groups, S group size, R directions.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_autoround.numerics.integer import grid
from hf_autoround.numerics.quantized import QuantizedTensor, dequantize
from hf_autoround.scheme import TensorSpec

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
