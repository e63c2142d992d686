# SPDX-License-Identifier: Apache-2.0
"""The layer that a quantized checkpoint is loaded into.

It holds a layout's tensors and is told which kernel multiplies with them. The tensors are parameters without gradient,
not buffers: accelerate offloads parameters only.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_autoround.layouts import Layout
from hf_autoround.numerics import QuantizedTensor, dequantize
from hf_autoround.numerics.grouping import ungroup
from hf_autoround.scheme import Scheme, TensorSpec

Kernel = Callable[["PackedLinear", Tensor], Tensor]


class PackedLinear(nn.Module):
    """`y = x W^T + b` on packed weights: x (..., I) -> y (..., O). Differentiable in x."""

    def __init__(
        self,
        shape: tuple[int, int],
        scheme: Scheme,
        layout: Layout,
        kernel: Kernel | None = None,
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.scheme, self.layout, self.kernel = scheme, layout, kernel or dequantize_and_multiply
        self.transposed = False  # whether it stands for a Conv1D, which stores (I, O)
        self.compute_dtype = dtype  # what the plain layer's weight would be; PEFT looks here too
        self.packed_names = tuple(layout.empty(self.spec, shape))
        for name, (size, kind) in layout.empty(self.spec, shape).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=kind), requires_grad=False))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None)
        self._is_hf_initialized = True  # transformers must not initialise what it loads into

    @property
    def spec(self) -> TensorSpec:
        """The numbers of the scheme."""
        assert self.scheme.weight is not None
        return self.scheme.weight

    def packed(self) -> dict[str, Tensor]:
        """Return the layout's tensors by name."""
        return {name: getattr(self, name) for name in self.packed_names}

    def quantized(self) -> QuantizedTensor:
        """Return the numbers, unpacked: elements (O, G, S)."""
        return self.layout.unpack(self.packed(), self.spec, (self.out_features, self.in_features))

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (O, I)."""
        return ungroup(dequantize(self.quantized()), self.in_features).to(dtype)

    @torch.no_grad()
    def load_quantized(self, tensor: QuantizedTensor) -> None:
        """Hold other numbers of the same scheme: elements (O, G, S)."""
        for name, packed in self.layout.pack(tensor, self.spec, self.in_features).items():
            getattr(self, name).copy_(packed)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.kernel(self, inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never cast, what is packed: `.to(bfloat16)` must not round the scales."""
        packed = {id(getattr(self, name)) for name in self.packed_names}
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}, {self.layout.name}, bias={self.bias is not None}"


def dequantize_and_multiply(layer: PackedLinear, inputs: Tensor) -> Tensor:
    """Return x W^T + b in the dtype of x: what every layer does until a faster kernel is chosen for it."""
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return F.linear(inputs, layer.dequantized(inputs.dtype), bias)
