# SPDX-License-Identifier: Apache-2.0
"""A block's own forward on other weights than its own, and the inputs that each of its weights sees.

The module is never changed: `torch.func.functional_call` swaps parameters for the duration of one call. So nothing has to
be put back, fused experts need no unfusing, and hooks that accelerate placed keep working.

Shapes: B samples, T tokens, H hidden size, E experts, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_autoround.layers.products import WatchProducts


def run_block(block: nn.Module, hidden: Tensor, args: tuple, kwargs: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """Return the block's hidden states (B, T, H), computed with `weights` (by parameter name) in place of its own."""
    output = functional_call(block, dict(weights), (hidden, *args), dict(kwargs)) if weights else block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@dataclass
class InputStatistics:
    """What each parameter was multiplied with: sums of squares ([E,] 1, I), the largest absolute value ([E,] 1), how many
    rows (of each expert), and some of the rows, evenly spaced: `samples[name, expert]` (expert 0 where there are none) is a
    list of (r, I). `kept` rows of each product at most, an eighth of that of each expert's."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    kept: int = 0

    def add(self, other: InputStatistics) -> None:
        """Take in what was seen after this."""
        for mine, theirs in ((self.squares, other.squares), (self.rows, other.rows)):
            for name, tensor in theirs.items():
                mine[name] = mine[name] + tensor if name in mine else tensor
        for name, tensor in other.largest.items():
            self.largest[name] = torch.maximum(self.largest[name], tensor) if name in self.largest else tensor
        for place, rows in other.samples.items():
            self.samples.setdefault(place, []).extend(rows)

    def on_cpu(self) -> InputStatistics:
        """Return the same in host memory."""
        squares, largest = ({name: tensor.cpu() for name, tensor in each.items()} for each in (self.squares, self.largest))
        samples = {place: [row.cpu() for row in rows] for place, rows in self.samples.items()}
        return InputStatistics(squares, largest, self.rows, samples, self.kept)

    def inputs(self, name: str) -> list[Tensor]:
        """Return the sampled rows (R, I) of a parameter, one tensor for each expert."""
        squares = self.squares[name]
        experts = squares.shape[0] if squares.ndim == 3 else 1
        nothing = squares.new_empty(0, squares.shape[-1])
        return [torch.cat(self.samples.get((name, expert), [nothing])) for expert in range(experts)]


@contextmanager
def watch_inputs(parameters: Mapping[str, tuple[Tensor, bool]], statistics: InputStatistics) -> Iterator[None]:
    """Add up what `parameters` (name -> tensor, transposed) are multiplied with inside the `with`."""
    with _InputWatcher(parameters, statistics):
        yield


class _InputWatcher(WatchProducts):
    def __init__(self, parameters: Mapping[str, tuple[Tensor, bool]], statistics: InputStatistics) -> None:
        super().__init__(parameters)
        self.statistics = statistics

    @torch.no_grad()
    def inputs_of(self, name: str, parameter: Tensor, expert: int, inputs: Tensor) -> Tensor:
        seen = inputs.detach().reshape(-1, inputs.shape[-1])
        precise = seen.to(torch.promote_types(seen.dtype, torch.float32))
        leading = parameter.shape[:-2]
        squares = precise.square().sum(0)
        total = self.statistics.squares.setdefault(name, squares.new_zeros(*leading, 1, squares.numel()))
        rows = self.statistics.rows.setdefault(name, torch.zeros(leading, dtype=torch.long))
        largest = self.statistics.largest.setdefault(name, squares.new_zeros(*leading, 1))
        if len(seen):
            at = expert if leading else ...
            total[at] += squares
            rows[at] += len(seen)
            largest[at] = torch.maximum(largest[at], torch.stack(torch.aminmax(seen)).abs().max())
        if kept := -(-self.statistics.kept // (8 if leading else 1)):
            # an odd step: one that divides the rows' length would take the same few positions of all, and first tokens are
            # unlike any
            step = -(-len(seen) // kept) | 1
            self.statistics.samples.setdefault((name, expert), []).append(seen[step // 2 :: step].clone())
        return inputs
