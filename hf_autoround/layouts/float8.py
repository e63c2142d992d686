# SPDX-License-Identifier: Apache-2.0
"""8-bit floats in files: the numbers as they are, and their scales, which writers name and shape differently.

Shapes: O out features, I in features, G groups, B rows and C columns of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_autoround.layouts.base import Layout
from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group_columns, group_count, ungroup
from hf_autoround.scheme import PerBlock, PerChannel, PerTensor, TensorSpec


@dataclass(frozen=True)
class Float8Stored(Layout):
    """`block_scale` is what the scales of blocks are called (they multiply, whatever the name says); scales of rows are
    (O, 1) if `upright`, else (O,)."""

    name: str
    block_scale: str
    upright: bool
    data_types: tuple[str, ...] = ("fp",)

    def refuse(self, spec: TensorSpec, shape: tuple[int, int]) -> str | None:
        """Return why a weight (O, I) cannot be stored, or None."""
        return None if spec.data_type in self.data_types else f"it stores 8-bit floats, not {spec.data_type}"

    def empty(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what `pack` makes of a weight (O, I)."""
        name, size = self._scales(spec, shape)
        return {"weight": (shape, torch.float8_e4m3fn), name: (size, torch.float32)}

    def pack(self, tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> dict[str, Tensor]:
        """Return weight (O, I) and its scales: (1,), (O,) or (O, 1), (O, G), or (ceil(O / B), ceil(I / C)) float32."""
        assert isinstance(tensor.scale, Tensor)
        weight, scale = ungroup(tensor.elements, columns), tensor.scale.squeeze(-1)
        name, size = self._scales(spec, (len(weight), columns))
        match spec.granularity:
            case PerTensor():
                scale = scale[:1]
            case PerBlock(rows, _):
                scale = scale[::rows]
        return {"weight": weight.contiguous(), name: scale.reshape(size).clone()}

    def unpack(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Undo `pack` for a weight (O, I)."""
        scale = tensors[self._scales(spec, shape)[0]].float()
        match spec.granularity:
            case PerTensor():
                scale = scale.reshape(1, 1).expand(shape[0], 1)
            case PerBlock(rows, _):
                scale = scale.repeat_interleave(rows, 0)[: shape[0]]
        size = group_columns(shape[1], spec.granularity)
        octets = F.pad(tensors["weight"].view(torch.uint8), (0, -shape[1] % size))  # what pads knows no float8
        elements = octets.view(torch.float8_e4m3fn).unflatten(-1, (-1, size))
        return QuantizedTensor(elements, scale.reshape(shape[0], -1, 1))

    def _scales(self, spec: TensorSpec, shape: tuple[int, int]) -> tuple[str, tuple[int, ...]]:
        """Return the name and the shape of the scales."""
        out, columns = shape
        match spec.granularity:
            case PerTensor():
                return "weight_scale", (1,)
            case PerChannel():
                return "weight_scale", (out, 1) if self.upright else (out,)
            case PerBlock(rows, _):
                return self.block_scale, (-(-out // rows), group_count(columns, spec.granularity))
        return "weight_scale", (out, group_count(columns, spec.granularity))
