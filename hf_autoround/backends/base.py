# SPDX-License-Identifier: Apache-2.0
"""What a backend is: a kernel for one layer's packed weights, and its reasons when it cannot be had."""

from typing import Protocol

import torch
from torch import Tensor

from hf_autoround.layers.packed_linear import PackedLinear


class Backend(Protocol):
    """Multiplies with packed weights; knows neither how they were tuned nor the model."""

    name: str

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None: ...
    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor: ...
