# SPDX-License-Identifier: Apache-2.0
"""Our own GPU kernels: every width, symmetric or not, without an extension to compile or install.

They read the GPTQ layouts. Codes and zero points of other layouts are put into that order when a layer is prepared.

Triton comes with the CUDA and ROCm builds of PyTorch. Its interpreter (TRITON_INTERPRET=1, Triton's own switch) runs the same
kernels on a CPU, slowly: that is for tests.
"""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend, Package, every_reason, multiply
from hf_autoround.layers.packed_linear import PackedLinear, Repacked
from hf_autoround.layouts import GPTQ, GPTQ_V2, IntegerLayout
from hf_autoround.layouts.bits import pack_bits
from hf_autoround.numerics.grouping import group_columns


class GPTQOrder(Repacked):
    """The codes and zero points of another layout, as version 2 of GPTQ's has them."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        layout, self.spec = cast(IntegerLayout, layer.layout), layer.spec
        self.shape = (layer.out_features, layer.in_features)
        codes = layout.unpack_codes(layer.qweight, self.spec, self.shape)
        zeros = layout.unpack_zeros(layer.qzeros, self.spec, layer.out_features).t()
        self.register_buffer("qweight", GPTQ_V2.pack_codes(codes, self.spec), persistent=False)
        self.register_buffer("qzeros", pack_bits(zeros, self.spec.bits), persistent=False)

    def codes(self) -> Tensor:
        """Return the unsigned codes (O, I) uint8 that it was made from."""
        return GPTQ_V2.unpack_codes(self.qweight, self.spec, self.shape)


class TritonGPTQ(Backend):
    """2 to 8 bits on a GPU, by our own Triton kernels"""

    name = "triton"
    needs = Package("triton", "triton")
    compiles = True

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return every reason why the kernels cannot run a layer there, or None."""
        elsewhere = device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
        columns, group = layer.in_features, group_columns(layer.in_features, layer.spec.granularity)
        return every_reason(
            elsewhere and f"it runs on CUDA and ROCm devices, not on {device.type}",
            device.type == "cuda"
            and layer.compute_dtype == torch.bfloat16
            and not _knows_bfloat16(device)
            and "this GPU is too old for bfloat16, which the model is in: load it with dtype=torch.float16",
            layer.spec.data_type != "int" and f"it multiplies integers, not {layer.spec.data_type}",
            set(layer.packed_names) != {"qweight", "qzeros", "scales"} and f"it cannot read the layout {layer.layout.name}",
            columns % 32 and f"it needs a multiple of 32 inputs, not {columns}",
            # a group as long as its row has been told
            group < columns and group % 32 and f"it needs groups of a multiple of 32 inputs, not of {group}",
        )

    def prepare(self, layer: PackedLinear) -> None:
        """Put the codes into GPTQ's order, unless they are."""
        if not isinstance(layer.layout, GPTQ):
            layer.repack(GPTQOrder)

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        return multiply(layer, inputs, _outputs, _input_gradient)


def _knows_bfloat16(device: torch.device) -> bool:
    if torch.version.hip is not None or not torch.cuda.is_available():  # named, but not here: as any that is sold now
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _outputs(layer: PackedLinear, rows: Tensor) -> Tensor:
    from hf_autoround.backends import triton_kernels

    product = torch.ops.hf_autoround.gptq_matmul if torch.compiler.is_compiling() else triton_kernels.gptq_matmul
    return product(rows, *_packed(layer), *_numbers(layer))


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    from hf_autoround.backends import triton_kernels

    dense = torch.ops.hf_autoround.gptq_dense if torch.compiler.is_compiling() else triton_kernels.gptq_dense
    return gradient @ dense(*_packed(layer), layer.in_features, *_numbers(layer), gradient.dtype).t()


def _packed(layer: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    own = layer._parameters  # read directly: `layer.qweight` searches for a microsecond
    if layer.repacked is None:
        return own["qweight"], own["qzeros"], own["scales"]
    codes = layer.repacked._buffers
    return codes["qweight"], codes["qzeros"], own["scales"]


def _numbers(layer: PackedLinear) -> tuple[int, int, int]:
    """Return bits, group and zero offset."""
    group = group_columns(layer.in_features, layer.spec.granularity)
    return layer.spec.bits, group, getattr(layer.layout, "zero_offset", GPTQ_V2.zero_offset)
