# SPDX-License-Identifier: Apache-2.0
"""The two ways in which rounding and scales follow their gradient: by Adam, and by the gradient's sign alone.

The sign walks as far for a code that hardly matters as for one that does, and as far for noise as for what all samples agree
on; Adam does not, and ends nearer to the float model in the same time (benchmarks/README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

# Adam's momentum has a short memory here, or codes go on moving where the gradient no longer points: after 50 steps on
# tinystories' blocks at 2 bits and a rate of .02 the held-out KL is .389 with .7, .423 with the usual .9. The squares' may be
# longer; what bfloat16 can hold ends there: with .999 a step would change less than its last bit.
ADAM_BETAS = (0.7, 0.99)
# The more weights a model has, the smaller is the gradient of each: with the usual 1e-8 that would decide how far they move.
ADAM_EPS = 1e-18


def adam_(parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], lr: float, step: int) -> None:
    """Do step number `step` (from 0) of Adam (https://arxiv.org/abs/1412.6980) in place.

    The moments may be bfloat16, which loses next to nothing (benchmarks/README.md); the arithmetic is the parameter's, which
    has to be dense, in any order of its dimensions.
    """
    # the fused kernel takes memory as it lies: a transposed weight's gradient may lie otherwise than its rounding
    gradient, first, second = (_lying_like(parameter, each) for each in (gradient, *moments))
    adam(
        [parameter], [gradient], [first], [second], [],
        [torch.full((), step, dtype=torch.float32, device=parameter.device)],
        fused=parameter.device.type in ("cpu", "cuda", "mps", "xpu"), foreach=False,
        amsgrad=False, beta1=ADAM_BETAS[0], beta2=ADAM_BETAS[1], lr=lr, weight_decay=0.0, eps=ADAM_EPS, maximize=False,
    )  # fmt: skip
    for moment, value in zip(moments, (first, second), strict=True):
        moment.copy_(value)


def _lying_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype and the memory order of the parameter, itself if it has them."""
    same = tensor.dtype == parameter.dtype and tensor.stride() == parameter.stride()
    return tensor if same else torch.empty_like(parameter).copy_(tensor)


class Adam(torch.optim.Optimizer):
    """`adam_` on parameter groups, with moments kept in bfloat16."""

    def __init__(self, params: list[dict]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["moments"] = tuple(torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in range(2))
                adam_(parameter, parameter.grad, state["moments"], group["lr"], state["step"])
                state["step"] += 1


class SignSGD(torch.optim.Optimizer):
    """p <- p - lr * sign(g), g smoothed by momentum (https://arxiv.org/abs/1802.04434)."""

    def __init__(self, params: list[dict], momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if group["momentum"]:
                    smooth = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
                    gradient = smooth.mul_(group["momentum"]).add_(gradient)
                parameter.sub_(gradient.sign(), alpha=group["lr"])
