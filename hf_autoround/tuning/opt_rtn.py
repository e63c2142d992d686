# SPDX-License-Identifier: Apache-2.0
"""Optimized round to nearest: scales of least error, weighted by how large each input is (sum of squares).

The weighting is the diagonal of the layer's Hessian, as in llama.cpp's importance matrix.
"""

import torch
from torch import Tensor

from hf_autoround.numerics import Tunables
from hf_autoround.numerics.grouping import group
from hf_autoround.tuning.task import BlockResult, BlockTask, OnStep, TunableWeight, TuningSettings


@torch.no_grad()
def searched(weight: TunableWeight, squares: Tensor | None) -> Tunables:
    """Return the tunables with the scales found by search; `squares` ([E,] 1, I) are sums of squared inputs.

    An expert that saw no token, and any input that was always zero, is searched as if all its inputs were alike.
    """
    importance = None
    if squares is not None:
        mean = squares.mean(-1, keepdim=True)
        even = torch.where(mean > 0, squares / mean.clamp(min=1e-30), torch.ones_like(squares))
        importance = group(even.clamp(min=1e-3), weight.spec.granularity)
    return weight.data_type.search(weight.groups(), weight.spec, importance)


@torch.no_grad()
def optimized_round_to_nearest(task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult:
    """Search the scales of every weight of the block."""
    layers = {name: weight.finished(searched(weight, task.importance.get(name))) for name, weight in task.weights.items()}
    return BlockResult(layers)
