# SPDX-License-Identifier: Apache-2.0
"""What a backend is: a kernel for one layer's packed weights, and its reasons when it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from hf_autoround.layers.packed_linear import PackedLinear

Rows = Callable[[PackedLinear, Tensor], Tensor]


@dataclass(frozen=True)
class Package:
    """An optional package: the module that is imported, and what `pip install` calls it."""

    module: str
    pip: str


class Backend(Protocol):
    """Multiplies with packed weights; knows neither how they were tuned nor the model.

    A subclass's docstring is what `hf-autoround list backends` says of it.
    """

    name: str
    needs: Package | None = None
    compiles = False  # whether torch.compile takes a layer whole, and CUDA graphs record it where there are any
    may_round_inputs = False  # to 8 bits, in models of 16 bits

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return every reason why it cannot run a layer there, or None."""
        ...

    def prepare(self, layer: PackedLinear) -> None:
        """Put a loaded layer into the order that `forward` reads. Most read the layout's own."""

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x, differentiable in x."""
        ...


def missing(backend: Backend) -> str | None:
    """Return which package has to be installed before a backend can run anything, or None."""
    if backend.needs is None or find_spec(backend.needs.module) is not None:
        return None
    return f"it needs {backend.needs.pip}, which is not installed: pip install {backend.needs.pip}"


def every_reason(*findings: str | int) -> str | None:
    """Return the findings that are reasons as the end of one sentence, or None; a check that passed gives False or 0."""
    return ", and ".join(str(finding) for finding in findings if finding) or None


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """Return what kernels for CPUs compute in: bfloat16, but what comes in float32 is meant to be exact."""
    return inputs.dtype if inputs.dtype in (torch.float32, torch.float64) else torch.bfloat16


def multiply(layer: PackedLinear, inputs: Tensor, forward: Rows, backward: Rows) -> Tensor:
    """Return x W^T + b for inputs of any shape, given the two products on rows: (M, I) -> (M, O) and back.

    Follows autocast, as `torch.nn.functional.linear` does.
    """
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        inputs = inputs.to(torch.get_autocast_dtype(kind))
    rows = inputs.reshape(-1, layer.in_features)
    if torch.is_grad_enabled() and inputs.requires_grad:
        outputs = _Multiply.apply(rows, layer, forward, backward)
    else:
        outputs = forward(layer, rows)
    if layer.bias is not None:
        outputs = outputs + layer.bias.to(outputs.dtype)
    return outputs.view(*inputs.shape[:-1], layer.out_features)


def register_operator(function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Make a function an operator too, `torch.ops.hf_autoround.<its name>`, which torch.compile takes as it is; `fake` returns an
    empty tensor like its result.

    Eager code calls the function: an operator takes another third of the time that a GPU kernel's launch does.
    """
    name = f"hf_autoround::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)


class _Multiply(torch.autograd.Function):
    """Kernels know no gradients: the inputs' is the outputs' times the weight."""

    @staticmethod
    def forward(ctx, rows, layer, forward, backward):  # noqa: ANN001, ANN205
        ctx.layer, ctx.product = layer, backward
        return forward(layer, rows)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        return ctx.product(ctx.layer, gradient), None, None, None
