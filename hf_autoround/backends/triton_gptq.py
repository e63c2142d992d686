# SPDX-License-Identifier: Apache-2.0
"""Our own GPU kernels for the GPTQ layouts: every width, symmetric or not, without an extension to compile or install.

Triton comes with the CUDA and ROCm builds of PyTorch. Its interpreter (TRITON_INTERPRET=1, Triton's own switch) runs the same
kernels on a CPU, slowly: that is for tests.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layouts.gptq import GPTQ
from hf_autoround.numerics.grouping import group_columns


class TritonGPTQ:
    """GPTQ layouts of 2 to 8 bits on a GPU, by our own Triton kernels."""

    name = "triton"

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return why the kernels cannot run a layer there, or None."""
        if find_spec("triton") is None:
            return "it needs Triton, which is not installed: pip install triton"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on CUDA and ROCm devices, not on {device.type}"
        if not isinstance(layer.layout, GPTQ):
            return f"it reads the layouts gptq and gptq_v2, not {layer.layout.name}"
        if layer.in_features % 32:
            return f"it needs a multiple of 32 inputs, not {layer.in_features}"
        group = group_columns(layer.in_features, layer.spec.granularity)
        return None if group % 32 == 0 else f"it needs groups of a multiple of 32 inputs, not of {group}"

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        from hf_autoround.backends.triton_kernels import gptq_matmul

        group = group_columns(layer.in_features, layer.spec.granularity)
        rows = inputs.reshape(-1, layer.in_features)
        offset = layer.layout.zero_offset
        outputs = gptq_matmul(rows, layer.qweight, layer.qzeros, layer.scales, layer.spec.bits, group, offset)
        outputs = outputs.view(*inputs.shape[:-1], layer.out_features)
        return outputs if layer.bias is None else outputs + layer.bias.to(outputs.dtype)
