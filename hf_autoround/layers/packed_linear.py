# SPDX-License-Identifier: Apache-2.0
"""The layer that a quantized checkpoint is loaded into.

It holds a layout's tensors and is told which kernel multiplies with them. The tensors are parameters without gradient,
not buffers: accelerate offloads parameters only.

A kernel may want the codes in another order: then `repack` drops the layout's and keeps the kernel's, so that memory holds
them once. What is saved, and what `packed`, `quantized` and `dequantized` return, is the layout's all the same.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_autoround.layers.activations import InputQuantizer, input_tensors
from hf_autoround.layouts import IntegerLayout, Layout
from hf_autoround.numerics import QuantizedTensor, dequantize
from hf_autoround.numerics.grouping import ungroup
from hf_autoround.scheme import Scheme, TensorSpec

Kernel = Callable[["PackedLinear", Tensor], Tensor]
CODES = "qweight"  # the tensor of integer layouts that a kernel may keep in its own order


class Repacked(nn.Module, ABC):
    """A layer's codes in a kernel's own order, made from the layer: its child `repacked`, in place of the layout's codes.

    What it holds are buffers that are not saved: the order may differ from machine to machine.
    """

    @abstractmethod
    def codes(self) -> Tensor:
        """Return the unsigned codes (O, I) uint8 that it was made from."""


class PackedLinear(nn.Module):
    """`y = x W^T + b` on packed weights, of quantized x if the scheme says so: (..., I) -> (..., O). Differentiable in x."""

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
        self.product_dtype: torch.dtype | None = None  # what inputs are cast to, where activations are wider; None: nothing
        self.packed_names, self.input_names = tuple(layout.empty(self.spec, shape)), tuple(input_tensors(scheme))
        for name, (size, kind) in (layout.empty(self.spec, shape) | input_tensors(scheme)).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=kind), requires_grad=False))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None)
        self.repacked: Repacked | None = None
        self.chooser: Callable[[PackedLinear], None] = _forget_kernel  # called on another kind of device
        self._is_hf_initialized = True  # transformers must not initialise what it loads into

    @property
    def spec(self) -> TensorSpec:
        """The numbers of the scheme."""
        assert self.scheme.weight is not None
        return self.scheme.weight

    @property
    def device(self) -> torch.device:
        """Where the numbers are; meta while accelerate keeps them elsewhere."""
        return next(self._parameters[name] for name in self.packed_names if name in self._parameters).device

    @torch.no_grad()
    def packed(self) -> dict[str, Tensor]:
        """Return the layout's tensors by name."""
        if self.repacked is None:
            return {name: getattr(self, name) for name in self.packed_names}
        codes = cast(IntegerLayout, self.layout).pack_codes(self.repacked.codes(), self.spec)
        return {name: codes if name == CODES else getattr(self, name) for name in self.packed_names}

    @torch.no_grad()
    def repack(self, kind: type[Repacked]) -> None:
        """Keep the codes in a kernel's order only."""
        self.repacked = kind(self)
        del self._parameters[CODES]

    def restore(self) -> None:
        """Undo `repack`."""
        codes = self.packed()[CODES]
        self.repacked = None
        self.register_parameter(CODES, nn.Parameter(codes, requires_grad=False))

    @torch.no_grad()
    def relayout(self, layout: Layout) -> None:
        """Keep the same numbers in another layout."""
        tensors = layout.pack(self.quantized(), self.spec, self.in_features)
        for name in self.packed_names:
            del self._parameters[name]
        self.layout, self.packed_names = layout, tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

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
        kind = None if self.repacked is None else type(self.repacked)
        if kind is not None:
            self.restore()
        for name, packed in self.layout.pack(tensor, self.spec, self.in_features).items():
            getattr(self, name).copy_(packed)
        if kind is not None:
            self.repack(kind)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.product_dtype is None or torch.is_autocast_enabled(inputs.device.type):
            return self.kernel(self, self.quantized_inputs(inputs))
        return self.kernel(self, self.quantized_inputs(inputs.to(self.product_dtype))).to(inputs.dtype)

    def quantized_inputs(self, inputs: Tensor) -> Tensor:
        """Return what the weight is multiplied with."""
        if self.scheme.activation is None:
            return inputs
        static = getattr(self, self.input_names[0]) if self.input_names else None
        return InputQuantizer(self.scheme.activation, static)(inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never cast, what is packed: `.to(bfloat16)` must not round the scales.

        A kernel and its order are good for one kind of device: on another the layout's tensors come back, and a kernel is
        chosen anew.
        """
        kind = self.device.type
        moves = fn(torch.empty(0, device=self.device)).device.type != kind
        if moves and self.repacked is not None:
            self.restore()
        kept = {*self.packed_names, *self.input_names}
        packed = {id(tensor) for name, tensor in self._parameters.items() if name in kept}
        if self.repacked is not None:
            packed |= {id(buffer) for buffer in self.repacked.buffers()}
        if self.product_dtype is None:
            self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

        super()._apply(move, recurse)
        if moves and kind != "meta":  # what leaves the meta device has no numbers yet
            self.chooser(self)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.repacked is not None:
            destination[prefix + CODES] = self.packed()[CODES]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        kind = None if self.repacked is None else type(self.repacked)
        if kind is not None:
            self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        if kind is not None:
            self.repack(kind)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}, {self.layout.name}, bias={self.bias is not None}"


def _forget_kernel(layer: PackedLinear) -> None:
    layer.kernel = dequantize_and_multiply


def dequantize_and_multiply(layer: PackedLinear, inputs: Tensor) -> Tensor:
    """Return x W^T + b in the dtype of x: what every layer does until a faster kernel is chosen for it."""
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return F.linear(inputs, layer.dequantized(inputs.dtype), bias)
