# SPDX-License-Identifier: Apache-2.0
"""What is learned about a weight: the base of every data type's own tunables.

A data type subclasses `Tunables` and says of each tensor whether it is learned and at which of the two rates. Neutral
tunables are round to nearest; tunables found by search and feedback are optimized round to nearest; tunables moved by
their gradient are SignRound. The function that applies them is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

Rate = Literal["rounding", "range"]


def learned(rate: Rate) -> Any:
    """Mark a field as learned, at the rate of the rounding (`lr`) or of the range (`minmax_lr`)."""
    return field(metadata={"rate": rate})


@dataclass(frozen=True)
class Tunables:
    """The tensors of one weight that a data type's `quantize` takes besides the weight itself."""

    def learned(self) -> dict[str, Tensor]:
        """Return the learned tensors by field name."""
        return {part.name: getattr(self, part.name) for part in fields(self) if "rate" in part.metadata}

    def rates(self) -> dict[str, Rate]:
        """Return which rate each learned tensor moves at."""
        return {part.name: part.metadata["rate"] for part in fields(self) if "rate" in part.metadata}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by field name."""
        every = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tunables:
        """Return tunables with these tensors; what is not among them is None."""
        return cls(**{part.name: tensors.get(part.name) for part in fields(cls)})

    def with_learned(self, tensors: Mapping[str, Tensor]) -> Tunables:
        """Return a copy with these tensors in place of its own."""
        return replace(self, **tensors)

    def at(self, groups: Tensor) -> Tunables:
        """Return those of some groups (K,) of each row, (..., G, .) -> (..., K, .)."""
        return replace(
            self,
            **{
                name: tensor.index_select(-2, groups) if tensor.shape[-2] > 1 else tensor
                for name, tensor in self.tensors().items()
            },
        )

    def where(self, chosen: Tensor, other: Tunables) -> Tunables:
        """Return a copy that takes from `other` the groups where `chosen` (..., G) is true."""
        mask, theirs = chosen.unsqueeze(-1), other.tensors()
        return replace(self, **{name: torch.where(mask, theirs[name], mine) for name, mine in self.tensors().items()})

    def clamp_(self) -> None:
        """Bring the learned tensors back into the range where they mean something, in place."""
