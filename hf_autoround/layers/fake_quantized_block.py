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
from torch.overrides import TorchFunctionMode


def run_block(block: nn.Module, hidden: Tensor, args: tuple, kwargs: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """Return the block's hidden states (B, T, H), computed with `weights` (by parameter name) in place of its own."""
    output = functional_call(block, dict(weights), (hidden, *args), dict(kwargs)) if weights else block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@dataclass
class InputStatistics:
    """What each parameter was multiplied with: sums of squares ([E,] 1, I), how many rows (of each expert), and some of
    the rows, evenly spaced: `samples[name, expert]` (expert 0 where there are none) is a list of (r, I)."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def add(self, other: InputStatistics) -> None:
        """Take in what was seen after this."""
        for mine, theirs in ((self.squares, other.squares), (self.rows, other.rows)):
            for name, tensor in theirs.items():
                mine[name] = mine[name] + tensor if name in mine else tensor
        for place, rows in other.samples.items():
            self.samples.setdefault(place, []).extend(rows)

    def on_cpu(self) -> InputStatistics:
        """Return the same in host memory."""
        squares = {name: tensor.cpu() for name, tensor in self.squares.items()}
        return InputStatistics(squares, self.rows, {place: [row.cpu() for row in rows] for place, rows in self.samples.items()})

    def inputs(self, name: str) -> list[Tensor]:
        """Return the sampled rows (R, I) of a parameter, one tensor for each expert."""
        squares = self.squares[name]
        experts = squares.shape[0] if squares.ndim == 3 else 1
        nothing = squares.new_empty(0, squares.shape[-1])
        return [torch.cat(self.samples.get((name, expert), [nothing])) for expert in range(experts)]


@contextmanager
def watch_inputs(parameters: Mapping[str, tuple[Tensor, bool]], statistics: InputStatistics) -> Iterator[None]:
    """Add up the squares of what `parameters` (name -> tensor, transposed) are multiplied with inside the `with`.

    It watches matrix products rather than modules, so a Linear, a Conv1D and one expert's slice of a fused parameter
    are all seen the same way: the product's weight is recognised by where it lies in memory.
    """
    with _InputWatcher(parameters, statistics):
        yield


class _InputWatcher(TorchFunctionMode):
    def __init__(self, parameters: Mapping[str, tuple[Tensor, bool]], statistics: InputStatistics) -> None:
        super().__init__()
        self.statistics = statistics
        self.by_storage = {
            tensor.untyped_storage().data_ptr(): (name, tensor, transposed) for name, (tensor, transposed) in parameters.items()
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func is nn.functional.linear or func in _PRODUCTS:
            position = _PRODUCTS.get(func, 1)
            # positional in every place that transformers calls them
            if len(args) > position and isinstance(args[position], Tensor):
                self._record(args[position - 1], args[position])
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def _record(self, inputs: Tensor, weight: Tensor) -> None:
        name, parameter, transposed = self.by_storage.get(weight.untyped_storage().data_ptr(), (None, None, None))
        if name is None or parameter is None:
            return
        columns = parameter.shape[-2 if transposed else -1]
        if inputs.shape[-1] != columns or sorted(weight.shape[-2:]) != sorted(parameter.shape[-2:]):
            return
        seen = inputs.detach().reshape(-1, inputs.shape[-1])
        squares = seen.to(torch.promote_types(seen.dtype, torch.float32)).square().sum(0)
        leading = parameter.shape[:-2]
        total = self.statistics.squares.setdefault(name, squares.new_zeros(*leading, 1, squares.numel()))
        rows = self.statistics.rows.setdefault(name, torch.zeros(leading, dtype=torch.long))
        expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0) if leading else 0
        if leading:
            total[expert, 0] += squares
            rows[expert] += len(seen)
        else:
            total[0] += squares
            rows += len(seen)
        kept = _SAMPLES_EXPERT if leading else _SAMPLES
        self.statistics.samples.setdefault((name, expert), []).append(seen[:: -(-len(seen) // kept) or 1].clone())


_SAMPLES, _SAMPLES_EXPERT = 32, 4  # rows kept of each product: a few hundred in all, a fraction of the activations

# which argument of each product is the weight: x @ w, addmm(bias, x, w)
_PRODUCTS = {torch.matmul: 1, Tensor.matmul: 1, Tensor.__matmul__: 1, torch.mm: 1, torch.addmm: 2}
