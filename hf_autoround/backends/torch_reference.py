# SPDX-License-Identifier: Apache-2.0
"""Dequantize, then multiply: takes every layer on every device, and is what other backends are compared with."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_autoround.backends.base import Backend
from hf_autoround.layers.packed_linear import PackedLinear


class TorchReference(Backend):
    """The backend `torch`."""

    name = "torch"

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Refuse nothing."""
        return None

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return F.linear(inputs, layer.dequantized(inputs.dtype), bias)
