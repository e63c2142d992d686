# SPDX-License-Identifier: Apache-2.0
"""Standing between a module's forward and its matrix products.

It watches products rather than modules, so a Linear, a Conv1D and one expert's slice of a fused parameter are all seen the
same way: the product's weight is recognised by where it lies in memory.

Shapes: R rows, E experts, O out features, I in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# which argument of each product is the weight: x @ w, addmm(bias, x, w)
_PRODUCTS = {F.linear: 1, torch.matmul: 1, Tensor.matmul: 1, Tensor.__matmul__: 1, torch.mm: 1, torch.addmm: 2}


class WatchProducts(TorchFunctionMode, ABC):
    """Inside a `with`, `inputs_of` sees what `weights` (name -> parameter ([E,] O, I), or transposed) are multiplied with,
    and says what they shall be multiplied with."""

    def __init__(self, weights: Mapping[str, tuple[Tensor, bool]]) -> None:
        super().__init__()
        self.by_storage = {
            tensor.untyped_storage().data_ptr(): (name, tensor, transposed) for name, (tensor, transposed) in weights.items()
        }

    @abstractmethod
    def inputs_of(self, name: str, parameter: Tensor, expert: int, inputs: Tensor) -> Tensor:
        """Return the inputs (..., I) of a weight's product; `expert` is 0 where there are none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        position = _PRODUCTS.get(func)
        # positional in every place that transformers calls them
        if position is not None and len(args) > position and isinstance(args[position], Tensor):
            inputs = self._seen(args[position - 1], args[position])
            args = (*args[: position - 1], inputs, *args[position:])
        return func(*args, **(kwargs or {}))

    def _seen(self, inputs: Tensor, weight: Tensor) -> Tensor:
        name, parameter, transposed = self.by_storage.get(weight.untyped_storage().data_ptr(), (None, None, None))
        if name is None or parameter is None:
            return inputs
        if inputs.shape[-1] != parameter.shape[-2 if transposed else -1]:
            return inputs
        if sorted(weight.shape[-2:]) != sorted(parameter.shape[-2:]):
            return inputs
        fused = parameter.ndim == 3
        expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0) if fused else 0
        return self.inputs_of(name, parameter, expert, inputs)


class PadRows(TorchFunctionMode):
    """Inside a `with`, the inputs (R, I) of products get rows of zeros up to a multiple of 64, and the outputs lose them.

    Each expert sees another number of tokens each time, and for every new shape a CPU's library compiles a bfloat16 kernel:
    450 rows of 256 by 512 take 1.4 ms the first time, then .2.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        position = _PRODUCTS.get(func)
        if position is None or not self._needs_rows(args, position) or "out" in (kwargs or {}):
            return func(*args, **(kwargs or {}))
        inputs = args[position - 1]
        padded = F.pad(inputs, (0, 0, 0, -len(inputs) % 64))
        return func(*args[: position - 1], padded, *args[position:], **(kwargs or {}))[: len(inputs)]

    @staticmethod
    def _needs_rows(args: tuple, position: int) -> bool:
        """Say whether this is (R, I) by a matrix, R no multiple of 64, with nothing added that has R rows itself."""
        if len(args) <= position or not all(isinstance(each, Tensor) for each in args[: position + 1]):
            return False
        added, inputs, weight = args[: position - 1], args[position - 1], args[position]
        return inputs.ndim == weight.ndim == 2 and len(inputs) % 64 != 0 and all(each.ndim == 1 for each in added)
