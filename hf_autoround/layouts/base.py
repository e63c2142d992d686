# SPDX-License-Identifier: Apache-2.0
"""What a layout is.

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hf_autoround.numerics import QuantizedTensor
from hf_autoround.scheme import TensorSpec


class Layout(Protocol):
    """Where the bits of one layer's numbers lie; knows no files, devices or modules."""

    name: str
    data_types: tuple[str, ...]

    @abstractmethod
    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None: ...
    @abstractmethod
    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]: ...
    @abstractmethod
    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]: ...
    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor: ...

    def as_stored(self, dtypes: Mapping[str, torch.dtype]) -> Layout:
        """Return the layout of tensors of these dtypes, by name inside a layer: itself, unless it leaves a dtype open."""
        return self


class IntegerLayout(Layout, Protocol):
    """A layout of unsigned codes "qweight", zero points "qzeros" and "scales" (G, O) float16, each readable by itself.

    Backends that keep codes in an order of their own read them by these, and give them back.
    """

    @abstractmethod
    def pack_codes(self, codes: Tensor, spec: TensorSpec) -> Tensor: ...
    @abstractmethod
    def unpack_codes(self, words: Tensor, spec: TensorSpec, shape: tuple[int, int]) -> Tensor: ...
    @abstractmethod
    def unpack_zeros(self, words: Tensor, spec: TensorSpec, out: int) -> Tensor: ...
