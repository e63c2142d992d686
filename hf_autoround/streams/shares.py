# SPDX-License-Identifier: Apache-2.0
"""Which samples each process works on.

The samples are cut into batches, which go to the processes in turn. Every process runs the very batches that one alone
would run, so activations, and what is gathered about them in the batches' order, are the same bits for any number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.errors import CalibrationError
from hf_autoround.models.processes import Processes


@dataclass(frozen=True)
class Share:
    """The samples `own` of one process, ascending; `place` is where each sample lies among them, -1 for the others'.

    Its batches are `own` in pieces of `batch_size`; `rounds` is how many the first process has, the others one less or as
    many.
    """

    own: Tensor
    place: Tensor
    batch_size: int
    rounds: int

    def of(self, indices: Tensor) -> Tensor:
        """Return those of some samples that are this share's."""
        return indices[self.place[indices] >= 0]

    def batches(self) -> list[Tensor]:
        """Return the places of each round's samples; the last round may have none."""
        batches = list(torch.arange(len(self.own)).split(self.batch_size))
        return batches + [torch.arange(0)] * (self.rounds - len(batches))


def share_of(samples: int, batch_size: int, processes: Processes) -> Share:
    """Return what this process does of `samples` samples.

    Raises CalibrationError if there are fewer samples than processes.
    """
    if samples < processes.count:
        raise CalibrationError(
            f"{processes.count} processes cannot share {samples} calibration samples: "
            f"start {samples} at the most, or give more data"
        )
    size = min(batch_size, samples // processes.count)
    owner = torch.arange(samples) // size % processes.count
    own = torch.nonzero(owner == processes.index).flatten()
    place = torch.full((samples,), -1)
    place[own] = torch.arange(len(own))
    batches = -(-samples // size)
    return Share(own, place, size, -(-batches // processes.count))
