# SPDX-License-Identifier: Apache-2.0
"""4 bits on Intel Gaudi: its own operator makes the weight, its own product multiplies.

The operator comes with Intel's build of PyTorch: `hpu.convert_from_uint4(codes, scales, zeros, dtype)` takes codes
(I, O / 8) and zero points (G, O / 8), eight along the outputs to a word, low bits first, and returns the weight (I, O).
Read from Intel's neural-compressor and vLLM plugin; the project has no Gaudi to run it on.

Shapes: M rows, O out features, I in features, G groups.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend, Package, missing, multiply
from hf_autoround.backends.torch_reference import TorchReference
from hf_autoround.layers.packed_linear import PackedLinear, Repacked
from hf_autoround.layouts import IntegerLayout
from hf_autoround.layouts.bits import pack_bits, unpack_bits
from hf_autoround.numerics.grouping import group_columns


class GaudiCodes(Repacked):
    """Codes (I, O / 8) and zero points (G, O / 8), both packed along the outputs."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        layout, out = cast(IntegerLayout, layer.layout), layer.out_features
        codes = layout.unpack_codes(layer.qweight, layer.spec, (out, layer.in_features))
        zeros = layout.unpack_zeros(layer.qzeros, layer.spec, out)
        self.out = out
        self.register_buffer("words", pack_bits(codes.t().contiguous(), 4), persistent=False)
        self.register_buffer("zeros", pack_bits(zeros.t().contiguous(), 4), persistent=False)

    def codes(self) -> Tensor:
        """Return the unsigned codes (O, I) uint8 that it was made from."""
        return unpack_bits(self.words, 4, self.out).t().contiguous()

    def weight(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight (I, O)."""
        return torch.ops.hpu.convert_from_uint4(self.words, scales.to(dtype), self.zeros, dtype)


class HPU(Backend):
    """4 bits on Intel Gaudi, by the operator of Intel's build of PyTorch."""

    name = "hpu"
    needs = Package("habana_frameworks", "habana-torch-plugin (from Intel's Gaudi packages)")

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return why the operator cannot run a layer there, or None."""
        if device.type != "hpu":
            return f"it runs on Gaudi (hpu), not on {device.type}"
        if layer.spec.data_type != "int" or layer.spec.bits != 4:
            return f"it multiplies 4-bit integers, not {layer.spec.bits}-bit {layer.spec.data_type}"
        if layer.out_features % 8:
            return f"it needs a multiple of 8 outputs, not {layer.out_features}"
        size = group_columns(layer.in_features, layer.spec.granularity)
        return (
            f"it needs inputs in whole groups of {size}, not {layer.in_features}" if layer.in_features % size else missing(self)
        )

    def prepare(self, layer: PackedLinear) -> None:
        """Pack the codes for the operator, and drop the layout's."""
        layer.repack(GaudiCodes)

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        if layer.repacked is None:  # it has moved to another device
            return TorchReference().forward(layer, inputs)
        return multiply(layer, inputs, _outputs, _input_gradient)


def _outputs(layer: PackedLinear, rows: Tensor) -> Tensor:
    return rows @ cast(GaudiCodes, layer.repacked).weight(layer.scales, rows.dtype)


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    return gradient @ cast(GaudiCodes, layer.repacked).weight(layer.scales, gradient.dtype).t()
