# SPDX-License-Identifier: Apache-2.0
"""What a data type is.

Shapes: ... leading dimensions, O rows, G groups per row, S elements per group; inputs of a layer (..., I).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_autoround.numerics.quantized import QuantizedTensor, dequantize
from hf_autoround.numerics.tunables import Tunables
from hf_autoround.scheme import ActivationSpec, PerChannel, PerGroup, PerTensor, TensorSpec

_BEHIND = 0.1  # steps: .02 and .3 were no better end to end


class DataType(Protocol):
    """A number grid and how its tunables bend it; knows no layers, files or optimizers.

    `largest` (..., O, 1, 1) is the largest |w| of all that shares a range with each row, for types that `share_range` with
    more than they are shown at a time: None means that they are shown all.
    """

    name: str
    tunables: type[Tunables]
    static_input = "input_scale"  # what files call the number that calibration gives
    shares_with_layers = False  # whether the layers that engines fuse have to share a range

    @abstractmethod
    def refuse(self, spec: TensorSpec, columns: int | None) -> str | None:
        """Return why there are no such weights with so many inputs (None: however many), or None."""
        ...

    def refuse_inputs(self, spec: ActivationSpec, columns: int | None) -> str | None:
        """Return why inputs cannot be quantized so, or None."""
        return f"inputs cannot be {spec.data_type}"

    def shares_range(self, spec: TensorSpec) -> bool:
        """Say whether `largest` matters."""
        return isinstance(spec.granularity, PerTensor)

    def calibrates_inputs(self, spec: ActivationSpec) -> bool:
        """Say whether calibration gives a number for the inputs (files call it `static_input`)."""
        return not spec.dynamic

    @abstractmethod
    def neutral(self, groups: Tensor, spec: TensorSpec, largest: Tensor | None = None) -> Tunables:
        """Return the tunables of round to nearest for the groups (..., O, G, S)."""
        ...

    def searched_range(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor) -> Tensor:
        """Return the `largest` with which round to nearest has the least weighted squared error: for scales that rows share, and
        that cannot be searched a few rows at a time."""
        return largest

    @abstractmethod
    def search(self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None) -> Tunables:
        """Return the tunables with the scales of least weighted squared error.

        `importance` (..., G, S), or broadcastable, weighs each element's error; None weighs all alike.
        """
        ...

    @abstractmethod
    def candidates(
        self, groups: Tensor, spec: TensorSpec, importance: Tensor | None, largest: Tensor | None = None
    ) -> list[Tunables]:
        """Return tunables among which each group may choose by the layer's own output, likeliest first."""
        ...

    @abstractmethod
    def with_scales(self, groups: Tensor, spec: TensorSpec, frozen: QuantizedTensor) -> Tunables:
        """Return the tunables that round `groups` to nearest with the scales of numbers that were frozen."""
        ...

    @abstractmethod
    def steps(self, groups: Tensor, aims: Tensor, spec: TensorSpec, tunables: Any) -> Tensor:
        """Return how far from `groups` the values `aims` are (both (..., O, G, S)), in steps of the grid: the unit of what is
        added before rounding."""
        ...

    @abstractmethod
    def range_rate(self, spec: TensorSpec) -> float:
        """Return how far a scale should move for each step of the rounding, relative to its size."""
        ...

    @abstractmethod
    def quantize(self, groups: Tensor, spec: TensorSpec, tunables: Any) -> QuantizedTensor:
        """Return the grid values of `groups` (..., O, G, S) under `tunables`, differentiable in what is learned."""
        ...

    def resumed(self, groups: Tensor, spec: TensorSpec, frozen: QuantizedTensor) -> Tunables:
        """Return the tunables that give the numbers that were frozen, or next to them where no rounding within half a step does.

        Whatever was not rounded to nearest comes to lie a little behind the middle between two numbers, so that tuning can
        take it back.
        """
        tunables = self.with_scales(groups, spec, frozen)
        elements, rounding = frozen.elements.float(), torch.zeros_like(groups)
        away = self.steps(groups, dequantize(frozen), spec, tunables)
        for reach in (away - away.sign() * (0.5 - _BEHIND), away):  # the second where the grid's steps change between the two
            other = self.quantize(groups, spec, tunables.with_learned({"rounding": rounding})).elements != elements
            rounding = torch.where(other, reach.clamp(-0.5, 0.5), rounding)
        return tunables.with_learned({"rounding": rounding})

    @abstractmethod
    def freeze(self, quantized: QuantizedTensor, spec: TensorSpec) -> QuantizedTensor:
        """Return what ships."""
        ...

    def input_scale(self, largest: Tensor, spec: ActivationSpec) -> Tensor:
        """Return what calibration gives: `static_input`, for inputs no larger than this. Nobody asks a type that
        `calibrates_inputs` in no case."""
        raise AssertionError(f"{self.name} has nothing to calibrate")

    @abstractmethod
    def quantize_inputs(self, inputs: Tensor, spec: ActivationSpec, static: Tensor | None) -> Tensor:
        """Return the inputs (..., I) as products see them, in their dtype: what engines compute at run time.

        `static` (1,) is the number that calibration gave, None if there is none.
        """
        ...


def refuse_ragged(spec: TensorSpec, columns: int | None, may_be_short: bool = False) -> str | None:
    """Return why rows of so many inputs cannot be cut into whole groups (or one group, if it `may_be_short`), or None."""
    match spec.granularity:
        case PerGroup(size) if columns is not None and columns % size and not (may_be_short and columns < size):
            return f"it needs a multiple of {size} inputs, not {columns}"
    return None


def refuse_static(spec: ActivationSpec) -> str | None:
    """Return why inputs cannot have these ranges, or None: each token or group its own, or calibration one for all."""
    match spec.granularity:
        case _ if not spec.dynamic and not spec.symmetric:
            return "inputs with act_dynamic=False are symmetric"
        case PerTensor() if spec.dynamic:
            return "inputs with one range for all (act_group_size=0) need act_dynamic=False, as calibration gives it"
        case PerChannel() | PerGroup() if not spec.dynamic:
            return "inputs with act_dynamic=False need act_group_size=0: calibration gives one range for all"
        case PerTensor() | PerChannel() | PerGroup():
            return None
    return "inputs are cut along their tokens, not into blocks"


def by_groups(inputs: Tensor, spec: TensorSpec, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `rounded` inputs (..., I): it sees the last dimension cut into groups that share a range."""
    match spec.granularity:
        case PerGroup(size) if size < inputs.shape[-1]:
            return rounded(inputs.unflatten(-1, (-1, size))).flatten(-2)
    return rounded(inputs)
