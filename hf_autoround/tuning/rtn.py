# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: neutral tunables. Needs no data."""

import torch

from hf_autoround.tuning.task import BlockResult, BlockTask, OnStep, TunableWeight, TuningSettings


@torch.no_grad()
def nearest(weight: TunableWeight):  # noqa: ANN201
    """Return one parameter rounded to nearest."""
    return weight.finished(weight.data_type.neutral(weight.groups(), weight.spec))


def round_to_nearest(task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult:
    """Round every weight of the block to nearest."""
    return BlockResult({name: nearest(weight) for name, weight in task.weights.items()})
