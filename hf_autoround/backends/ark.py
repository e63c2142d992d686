# SPDX-License-Identifier: Apache-2.0
"""auto-round-lib's kernels for CPUs: in float32 for models in float32, for others whatever they say is fastest.

That is 8 bits for the inputs too where the processor multiplies bytes (VNNI, AMX): the fastest of all, and not what was tuned. It
costs .6 % of a layer's output, 1 to 3 % of the KL divergence at 4 bits, and more than doubles that of 8 bits
(benchmarks/README.md). So models in 16 bits get it by name only. Inputs are passed as float32 always: the package's kernels for
bfloat16 ones have corrupted the heap (auto-round-lib 0.16).
https://pypi.org/project/auto-round-lib

Shapes: M rows of inputs, N out features, K in features, G groups.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend, Package, every_reason, multiply
from hf_autoround.errors import require
from hf_autoround.layers.packed_linear import PackedLinear, Repacked
from hf_autoround.layouts import IntegerLayout
from hf_autoround.numerics.grouping import group_columns

_PACKAGE = Package("auto_round_kernel", "auto-round-lib")
_BITS = (2, 3, 4, 8)


def _ark() -> Any:
    return require(_PACKAGE.module, for_='backend="ark"', install=_PACKAGE.pip)


class ArkCodes(Repacked):
    """The package's own blob: codes, float32 scales and zero points in one tensor."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        layout, spec = cast(IntegerLayout, layer.layout), layer.spec
        self.shape = (layer.out_features, layer.in_features)
        self.middle = 2 ** (spec.bits - 1)
        zeros = layout.unpack_zeros(layer.qzeros, spec, layer.out_features).t().to(torch.int16) - self.middle
        asymmetric = bool(zeros.any())
        self.how = (group_columns(layer.in_features, spec.granularity), _arithmetic(layer), f"int{spec.bits}", "fp32", asymmetric)
        codes = layout.unpack_codes(layer.qweight, spec, self.shape).t().to(torch.int16) - self.middle
        empty = torch.empty(0, dtype=torch.int8)
        blob = _ark().repack_quantized_weight(
            codes.to(torch.int8).contiguous(),
            layer.scales.float().contiguous(),
            zeros.to(torch.int8).contiguous() if asymmetric else empty,
            *self.how,
        )
        self.register_buffer("blob", blob, persistent=False)
        self.register_buffer("scales", layer.scales.float().t().contiguous(), persistent=False)
        self.register_buffer("zeros", zeros.t().contiguous() if asymmetric else None, persistent=False)

    def weight(self) -> Tensor:
        """Return the weight (N, K) float32."""
        return _ark().unpack_weight(self.blob, torch.float32, *self.shape, *self.how)

    def codes(self) -> Tensor:
        """Return the unsigned codes (N, K) uint8: the weights over their scales, which float32 divides exactly."""
        groups = self.weight().unflatten(1, (-1, self.how[0])) / self.scales.unsqueeze(-1)
        codes = groups.round().to(torch.int16) + self.middle
        return (codes if self.zeros is None else codes + self.zeros.unsqueeze(-1)).flatten(1).to(torch.uint8)


class Ark(Backend):
    """2, 3, 4 and 8 bits on a CPU by auto-round-lib; rounds inputs to 8 bits where that is fast, but in float32 models"""

    name = "ark"
    needs = _PACKAGE
    may_round_inputs = True

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return every reason why the kernels cannot run a layer there, or None."""
        spec = layer.spec
        size = group_columns(layer.in_features, spec.granularity)
        reasons = every_reason(
            device.type != "cpu" and f"it runs on a CPU, not on {device.type}",
            (spec.data_type != "int" or spec.bits not in _BITS)
            and f"it multiplies integers of 2, 3, 4 or 8 bits, not {layer.scheme.name}",
            set(layer.packed_names) != {"qweight", "qzeros", "scales"} and f"it cannot read the layout {layer.layout.name}",
            layer.in_features % size and f"it needs whole groups, and {layer.in_features} inputs are none of {size}",
        )
        return reasons or ("a scale is zero: its order could not be undone" if bool((layer.scales == 0).any()) else None)

    def prepare(self, layer: PackedLinear) -> None:
        """Pack the codes for the kernels, and drop the layout's."""
        layer.repack(ArkCodes)

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        if cast(ArkCodes, layer.repacked).how[1] != _arithmetic(layer):  # the model was cast
            layer.restore()
            layer.repack(ArkCodes)
        return multiply(layer, inputs, _outputs, _input_gradient)


def _arithmetic(layer: PackedLinear) -> str:
    return "fp32" if layer.compute_dtype == torch.float32 else "auto"


def _outputs(layer: PackedLinear, rows: Tensor) -> Tensor:
    codes = cast(ArkCodes, layer.repacked)
    no_bias = torch.empty(0)
    return _ark().woqgemm(rows.float().contiguous(), codes.blob, no_bias, *codes.shape, *codes.how).to(rows.dtype)


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    return (gradient.float() @ cast(ArkCodes, layer.repacked).weight()).to(gradient.dtype)
