# SPDX-License-Identifier: Apache-2.0
"""One type for every quantized tensor, and the one function that turns it back into weights.

`w = (elements - zero_point) * (scale / divisor) - minimum`. A scale or a minimum may itself be a QuantizedTensor: that is
how two-level formats (a scale of scales) fit without a type of their own. Whatever is tuned, written or run goes through
`dequantize`; nothing downstream ever rounds a weight again.

Shapes: ... leading dimensions (rows, or experts and rows), G groups per row, S elements per group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Numbers on a grid: elements (..., G, S); scale, zero_point and minimum (..., G, 1) or broadcastable to that.

    Whatever rows share, each row has: so rows can be cut out of every tensor alike. `divisor` (..., 1, 1) is a scale of
    scales that files hold as its reciprocal; multiplying with that would differ in the last bit. During tuning the tensors
    are float32 and carry gradients; `frozen` gives what ships.
    """

    elements: Tensor
    scale: Tensor | QuantizedTensor
    zero_point: Tensor | None = None
    minimum: Tensor | QuantizedTensor | None = None
    divisor: Tensor | None = None

    def frozen(self, element_dtype: torch.dtype, scale_dtype: torch.dtype) -> QuantizedTensor:
        """Return the same numbers without gradients, in the types that store them exactly.

        The zero point gets the elements' type. Nested scales and divisors keep the types they have.
        """
        zero_point = None if self.zero_point is None else self.zero_point.detach().to(element_dtype)
        scale, minimum = _detached(self.scale, scale_dtype), _detached(self.minimum, scale_dtype)
        assert scale is not None
        divisor = None if self.divisor is None else self.divisor.detach()
        return QuantizedTensor(self.elements.detach().to(element_dtype), scale, zero_point, minimum, divisor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name; nothing may be nested."""
        every = {part.name: getattr(self, part.name) for part in fields(self)}
        assert not any(isinstance(part, QuantizedTensor) for part in every.values())
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """Undo `tensors`."""
        return cls(**tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """Return a copy with every tensor changed."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})


def _detached(part: Tensor | QuantizedTensor | None, dtype: torch.dtype) -> Tensor | QuantizedTensor | None:
    if isinstance(part, QuantizedTensor):
        return QuantizedTensor(
            part.elements.detach(), _detached(part.scale, dtype), part.zero_point, _detached(part.minimum, dtype)
        )
    return None if part is None else part.detach().to(dtype)


def dequantize(quantized: Tensor | QuantizedTensor) -> Tensor:
    """Return the float32 numbers, (..., G, S)."""
    if isinstance(quantized, Tensor):
        return quantized.float()
    values = quantized.elements.float()
    if quantized.zero_point is not None:
        values = values - quantized.zero_point.float()
    scale = dequantize(quantized.scale)
    values = values * (scale if quantized.divisor is None else scale / quantized.divisor)
    return values if quantized.minimum is None else values - dequantize(quantized.minimum)
