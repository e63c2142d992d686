# SPDX-License-Identifier: Apache-2.0
"""Quantized inputs: of a float block while it is tuned, and what a packed layer needs for them.

What is computed is the data type's `quantize_inputs`, in both places.

Shapes: E experts, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.layers.products import WatchProducts
from hf_autoround.numerics import data_type
from hf_autoround.numerics.rounding import straight_through
from hf_autoround.scheme import ActivationSpec, Scheme


@dataclass(frozen=True)
class InputQuantizer:
    """How one parameter's inputs are quantized; `static` ([E,] 1) is what calibration gave, None if it gives nothing."""

    spec: ActivationSpec
    static: Tensor | None = None

    def __call__(self, inputs: Tensor, expert: int = 0) -> Tensor:
        """Return the inputs (..., I) as products see them; the gradient passes straight through."""
        static = self.static
        if static is not None:
            static = (static[expert] if static.ndim == 2 else static).to(inputs.device)
        return straight_through(inputs, lambda values: data_type(self.spec).quantize_inputs(values, self.spec, static))


def input_quantizer(scheme: Scheme, static: Tensor | None) -> InputQuantizer | None:
    """Return how the inputs under a scheme are quantized, None if they stay in 16 bits."""
    return None if scheme.activation is None else InputQuantizer(scheme.activation, static)


def quantized_inputs(weights: Mapping[str, tuple[Tensor, bool, InputQuantizer]]) -> AbstractContextManager:
    """Quantize, inside a `with`, what `weights` (name -> parameter, transposed, how) are multiplied with."""
    return _QuantizeInputs(weights) if weights else nullcontext()


class _QuantizeInputs(WatchProducts):
    def __init__(self, weights: Mapping[str, tuple[Tensor, bool, InputQuantizer]]) -> None:
        super().__init__({name: (tensor, transposed) for name, (tensor, transposed, _) in weights.items()})
        self.quantizers = {name: quantizer for name, (_, _, quantizer) in weights.items()}

    def inputs_of(self, name: str, parameter: Tensor, expert: int, inputs: Tensor) -> Tensor:
        return self.quantizers[name](inputs, expert)


def input_tensors(scheme: Scheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of what a layer holds for its inputs, besides the layout's tensors."""
    spec = scheme.activation
    if spec is None or not data_type(spec).calibrates_inputs(spec):
        return {}
    return {data_type(spec).static_input: ((1,), torch.float32)}
