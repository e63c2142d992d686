# SPDX-License-Identifier: Apache-2.0
"""Where quantizable weights live, and what becomes of them.

A model computes with *parameters*; a checkpoint names 2-D *sites*. For a Linear the two are the same thing. Experts are
one 3-D parameter in memory and one or two sites per expert on disk. Numbers are chosen per parameter (all experts at
once), names are given per site.

Shapes: E experts, O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_autoround.numerics import QuantizedTensor, dequantize
from hf_autoround.numerics.grouping import ungroup
from hf_autoround.scheme import Scheme


@dataclass(frozen=True)
class WeightSite:
    """One 2-D weight: its checkpoint module name, and its place in a parameter of the model.

    `name` is the module's name in memory and, with `.weight`, in a checkpoint. `parameter` is the parameter's full name;
    `expert` and `rows` (first, last + 1) say which part of a fused parameter it is. `transposed` parameters hold (I, O).
    `shape` is (O, I) of the site alone. `fused_on_disk`: the checkpoint too holds all experts in one tensor.
    """

    name: str
    parameter: str
    shape: tuple[int, int]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    fused_on_disk: bool = False

    def part(self, oriented: Tensor) -> Tensor:
        """Return this site's part of a tensor whose leading dimensions are the parameter's ([E,] O, ...)."""
        tensor = oriented if self.expert is None else oriented[self.expert]
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class QuantizedLayer:
    """One site's (or one whole parameter's) result: frozen numbers, grouped ([E,] O, G, S), and their scheme.

    `error` is how far the whole parameter is from its float values: the norm of the difference over their norm.
    `static` ([E,] 1) is what calibration gave for its inputs, None if they are not quantized so.
    """

    tensor: QuantizedTensor
    columns: int
    scheme: Scheme
    error: float
    static: Tensor | None = None

    def weight(self) -> Tensor:
        """Return the float32 weight, ([E,] O, I)."""
        return ungroup(dequantize(self.tensor), self.columns)

    def to(self, device: torch.device) -> QuantizedLayer:
        """Return the result with its tensors on a device."""
        static = None if self.static is None else self.static.to(device)
        return replace(self, tensor=self.tensor.map(lambda tensor: tensor.to(device)), static=static)

    def at(self, site: WeightSite) -> QuantizedLayer:
        """Return the part of a parameter's result that belongs to one of its sites."""
        static = self.static if self.static is None or site.expert is None else self.static[site.expert]
        return replace(self, tensor=self.tensor.map(site.part), static=static)


def oriented(parameter: Tensor, transposed: bool) -> Tensor:
    """Return a parameter as ([E,] O, I), a view; undoes itself."""
    return parameter.transpose(-1, -2) if transposed else parameter
