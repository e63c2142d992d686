# SPDX-License-Identifier: Apache-2.0
"""Intel Gaudi: dequantize, then multiply, both by its own PyTorch.

Its operator for packed weights, `hpu.convert_from_uint4`, is not used: the project has no Gaudi to try it on.
"""

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend, Package
from hf_autoround.layers.packed_linear import PackedLinear, dequantize_and_multiply


class HPU(Backend):
    """every layer on Intel Gaudi, dequantized on every call"""

    name = "hpu"
    needs = Package("habana_frameworks", "habana-torch-plugin")

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return why the layer is not Gaudi's, or None."""
        return None if device.type == "hpu" else f"it runs on Gaudi (device hpu), not on {device.type}"

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        return dequantize_and_multiply(layer, inputs)
