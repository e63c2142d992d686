# SPDX-License-Identifier: Apache-2.0
"""Our own GPU kernels for the GPTQ layouts: every width, symmetric or not, without an extension to compile or install.

Triton comes with the CUDA and ROCm builds of PyTorch. Its interpreter (TRITON_INTERPRET=1, Triton's own switch) runs the same
kernels on a CPU, slowly: that is for tests.
"""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend, Package, every_reason, multiply
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layouts.gptq import GPTQ
from hf_autoround.numerics.grouping import group_columns


class TritonGPTQ(Backend):
    """2 to 8 bits in the GPTQ layouts on a GPU, by our own Triton kernels"""

    name = "triton"
    needs = Package("triton", "triton")

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return every reason why the kernels cannot run a layer there, or None."""
        elsewhere = device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
        columns, group = layer.in_features, group_columns(layer.in_features, layer.spec.granularity)
        return every_reason(
            elsewhere and f"it runs on CUDA and ROCm devices, not on {device.type}",
            not isinstance(layer.layout, GPTQ) and f"it reads the layouts gptq and gptq_v2, not {layer.layout.name}",
            columns % 32 and f"it needs a multiple of 32 inputs, not {columns}",
            # a group as long as its row has been told
            group < columns and group % 32 and f"it needs groups of a multiple of 32 inputs, not of {group}",
        )

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        return multiply(layer, inputs, _outputs, _input_gradient)


def _outputs(layer: PackedLinear, rows: Tensor) -> Tensor:
    from hf_autoround.backends.triton_kernels import gptq_matmul

    return gptq_matmul(rows, *_packed(layer), *_numbers(layer))


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    from hf_autoround.backends.triton_kernels import gptq_dense

    return gradient @ gptq_dense(*_packed(layer), layer.in_features, *_numbers(layer), gradient.dtype).t()


def _packed(layer: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    return layer.qweight, layer.qzeros, layer.scales


def _numbers(layer: PackedLinear) -> tuple[int, int, int]:
    """Return bits, group and zero offset."""
    group = group_columns(layer.in_features, layer.spec.granularity)
    return layer.spec.bits, group, cast(GPTQ, layer.layout).zero_offset
