# SPDX-License-Identifier: Apache-2.0
"""Dequantize, then multiply: takes every layer on every device, and is what other backends are compared with."""

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend
from hf_autoround.layers.packed_linear import PackedLinear, dequantize_and_multiply


class TorchReference(Backend):
    """every layer anywhere, dequantized on every call"""

    name = "torch"
    compiles = True

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Refuse nothing."""
        return None

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        return dequantize_and_multiply(layer, inputs)
