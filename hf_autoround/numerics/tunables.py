# SPDX-License-Identifier: Apache-2.0
"""What is learned about a weight: the base of every data type's own tunables.

A data type subclasses `Tunables` and says of each tensor whether it is learned and at which of the two rates. Neutral
tunables are round to nearest; tunables found by search are optimized round to nearest; tunables moved by their
gradient's sign are SignRound. The function that applies them is the same.
"""

from __future__ import annotations

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

    def with_learned(self, tensors: dict[str, Tensor]) -> Tunables:
        """Return a copy with these tensors in place of its own."""
        return replace(self, **tensors)

    def where(self, chosen: Tensor, other: Tunables) -> Tunables:
        """Return a copy that takes from `other` the groups where `chosen` (..., G) is true."""
        mask, taken = chosen.unsqueeze(-1), {}
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            taken[part.name] = None if mine is None else torch.where(mask, theirs, mine)
        return replace(self, **taken)

    def clamp_(self) -> None:
        """Bring the learned tensors back into the range where they mean something, in place."""
