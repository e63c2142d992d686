# SPDX-License-Identifier: Apache-2.0
"""Tensors in, tensors out: the number grids and how what is learned bends them.

To add a data type: write `numerics/<name>.py` with `name`, `tunables`, `neutral`, `search`, `candidates`, `resumed`,
`range_rate`, `quantize` and `freeze`, and add it to DATA_TYPES. The law tests take it from there.
"""

from typing import Any, Protocol

from torch import Tensor

from hf_autoround.numerics.integer import Integer
from hf_autoround.numerics.quantized import QuantizedTensor, dequantize
from hf_autoround.numerics.tunables import Tunables
from hf_autoround.registry import find
from hf_autoround.scheme import TensorSpec


class DataType(Protocol):
    """A number grid and how its tunables bend it; knows no layers, files or optimizers."""

    name: str
    tunables: type[Tunables]

    def neutral(self, groups: Tensor, spec: TensorSpec) -> Tunables: ...
    def search(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None) -> Tunables: ...
    def candidates(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None) -> list[Tunables]: ...
    def resumed(self, groups: Tensor, spec: TensorSpec, frozen: QuantizedTensor) -> Tunables: ...
    def range_rate(self, spec: TensorSpec) -> float: ...
    def quantize(self, groups: Tensor, spec: TensorSpec, tunables: Any, shared: Any = None) -> QuantizedTensor: ...
    def freeze(self, quantized: QuantizedTensor, spec: TensorSpec) -> QuantizedTensor: ...


DATA_TYPES: tuple[DataType, ...] = (Integer(),)


def data_type(spec: TensorSpec) -> DataType:
    """Return the data type that `spec` names."""
    return find(DATA_TYPES, spec.data_type, kind="data type")


__all__ = ["DATA_TYPES", "DataType", "QuantizedTensor", "Tunables", "data_type", "dequantize"]
