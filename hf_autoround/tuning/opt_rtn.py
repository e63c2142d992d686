# SPDX-License-Identifier: Apache-2.0
"""Optimized round to nearest: the scales, and then the rounding, that hurt a layer's output least. No gradients.

Search weighs each weight's error by how large its input is (the diagonal of the layer's Hessian, as in llama.cpp's
importance matrix). That ignores how the errors of a row add up, so several candidates are kept for each group, and the
groups then choose among them, one after the other, by the error of the row's output on sampled inputs. Under the scales
that were chosen, each weight is rounded such that it makes good what those before it got wrong (GPTQ).

Experts that saw no token are rounded to nearest: nothing says which of their weights matter.

Shapes: E experts, O out features, I in features, G groups, S group size, R sampled input rows, C candidates, K columns that
share their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hf_autoround.layers.sites import QuantizedLayer
from hf_autoround.numerics import Tunables, dequantize
from hf_autoround.numerics.feedback import SPAN, Feedback, feedback, rounded_with_feedback
from hf_autoround.numerics.grouping import group, rows_together
from hf_autoround.tuning.rtn import by_experts, by_rows, joined_tunables, portions
from hf_autoround.tuning.task import BlockResult, BlockTask, OnStep, TunableWeight, TuningSettings

SAMPLED_ROWS = 4096  # inputs of each weight to ask for
# elements whose scales are chosen at once, which takes a float32 copy for every candidate; many small ones take a GPU long
_CHUNK, _CHUNK_OF_GPU = 1 << 22, 1 << 25
_ROUNDED = 1 << 26  # elements rounded at once: few copies of them, but every column of theirs is a step
_FACTORS = 1 << 24  # elements of (E, K, K) for experts that are rounded at once (and share an order of columns)
_CHOOSING = 512  # rows of inputs by which groups choose
_SWEEPS = 3


@torch.no_grad()
def searched(weight: TunableWeight, squares: Tensor | None) -> Tunables:
    """Return the tunables with the scales found by search; `squares` ([E,] 1, I) are sums of squared inputs."""
    found = weight.data_type.search(weight.groups(), weight.spec, _importance(weight, squares), weight.largest)
    return _nearest_if_unseen(weight, squares, found)


@torch.no_grad()
def optimized_round_to_nearest(task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult:
    """Choose the scales of every weight of the block, and round under them."""
    layers, shared = {}, _SharedFeedback()
    for name, weight in task.weights.items():
        squares, inputs = task.importance.get(name), task.inputs.get(name, ())
        weight = _with_range(weight, squares)
        decide = partial(_optimized, squares=squares, inputs=inputs, shared=shared)
        layers[name] = by_experts(weight, _experts_together(inputs), decide)
    return BlockResult(layers)


class _SharedFeedback:
    """The feedback of the last inputs: a query, a key and a value, a gate and what it opens, have the same."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.spans: list[Feedback] = []

    def of(self, inputs: list[Tensor]) -> list[Feedback]:
        if len(inputs) != len(self.inputs) or not all(map(_same, inputs, self.inputs)):
            self.inputs, self.spans = inputs, feedback(inputs) if inputs else []
        return self.spans


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def _experts_together(inputs: Sequence[Tensor]) -> int:
    """Return for how many experts the factors of their Hessians are held at once."""
    columns = min(SPAN, inputs[0].shape[-1]) if inputs else 1
    return max(1, _FACTORS // columns**2)


def _optimized(
    weight: TunableWeight, experts: slice, squares: Tensor | None, inputs: Sequence[Tensor], shared: _SharedFeedback
) -> QuantizedLayer:
    """Return a weight, or some `experts` of one, with the scales and the rounding that are best for its inputs."""
    if weight.parameter.ndim == 3:
        squares, inputs = None if squares is None else squares[experts], inputs[experts]
    inputs = [rows.to(weight.parameter.device) for rows in inputs]
    spans = shared.of(inputs)
    chunk = _CHUNK if weight.parameter.device.type == "cpu" else _CHUNK_OF_GPU
    fewer = [rows[:: -(-len(rows) // _CHOOSING) | 1] for rows in inputs]

    def decide(rows: TunableWeight) -> Tunables:
        chosen = joined_tunables([_chosen(portion, squares, fewer) for portion in portions(rows, chunk)])
        return rounded_with_feedback(rows.data_type, rows.groups(), rows.spec, chosen, spans)

    return by_rows(weight, decide, _ROUNDED)


def _importance(weight: TunableWeight, squares: Tensor | None) -> Tensor | None:
    """Return how much the error of each weight counts; all count alike if the weight's inputs are not known."""
    if squares is None:
        return None
    relative = squares / squares.mean(-1, keepdim=True).clamp(min=1e-30)
    return group(relative.clamp(min=1e-3), weight.spec.granularity)


def _with_range(weight: TunableWeight, squares: Tensor | None) -> TunableWeight:
    """Return the weight, whole, with the range that the search gives where all its rows share one."""
    if rows_together(weight.spec.granularity) is not None:
        return weight
    groups, largest = weight.groups(), weight.largest
    if largest is None:
        largest = groups.abs().amax((-3, -2, -1), keepdim=True).expand(*groups.shape[:-2], 1, 1)
    found = weight.data_type.searched_range(groups, weight.spec, _importance(weight, squares), largest)
    if squares is not None:  # experts that saw no token keep theirs
        found = torch.where(squares.any(-1, keepdim=True)[..., None], found, largest)
    return replace(weight, largest=found)


def _nearest_if_unseen(weight: TunableWeight, squares: Tensor | None, found: Tunables) -> Tunables:
    """Return what was found, with neutral tunables for experts whose inputs are all zero."""
    if squares is None or (seen := squares.any(-1, keepdim=True)).all():
        return found
    return found.where(~seen, weight.neutral())


def _chosen(weight: TunableWeight, squares: Tensor | None, inputs: Sequence[Tensor]) -> Tunables:
    """Return the best mixture of the data type's candidates; `inputs` are (R, I), one for each expert or just one."""
    groups = weight.groups()
    candidates = weight.data_type.candidates(groups, weight.spec, _importance(weight, squares), weight.largest)
    errors = [dequantize(weight.data_type.quantize(groups, weight.spec, each)).sub_(groups) for each in candidates]
    choice = torch.zeros(groups.shape[:-1], dtype=torch.long, device=groups.device)
    for expert, rows in enumerate(inputs):
        if len(rows):
            place = expert if groups.ndim == 4 else ...
            grouped = group(rows.to(groups.device, torch.float32), weight.spec.granularity)
            choice[place] = choose_groups(torch.stack([error[place] for error in errors]), grouped)
    best = candidates[0]
    for number, candidate in enumerate(candidates[1:], 1):
        best = best.where(choice == number, candidate)
    return _nearest_if_unseen(weight, squares, best)


def choose_groups(errors: Tensor, inputs: Tensor) -> Tensor:
    """Return which candidate each group takes, (O, G), so that the rows' output errors are small.

    `errors` (C, O, G, S) are the candidates' weight errors, `inputs` (R, G, S) sampled inputs. Coordinate descent from
    candidate 0: a group changes only if that lowers the squared error of its row, so no row ends worse than it began.
    """
    _, rows, groups, _ = errors.shape
    choice = torch.zeros(rows, groups, dtype=torch.long, device=errors.device)
    residual = errors[0].flatten(1) @ inputs.flatten(1).t()
    for _ in range(_SWEEPS):
        before = choice.clone()
        for place in range(groups):
            outputs = errors[:, :, place] @ inputs[:, place].t()  # (C, O, R)
            current = choice[:, place].view(1, rows, 1).expand(1, rows, outputs.shape[-1])
            others = residual - outputs.gather(0, current)[0]
            choice[:, place] = (others + outputs).square_().sum(-1).argmin(0)
            current = choice[:, place].view(1, rows, 1).expand(1, rows, outputs.shape[-1])
            residual = others.add_(outputs.gather(0, current)[0])
        if torch.equal(before, choice):
            break
    return choice
