# SPDX-License-Identifier: Apache-2.0
"""Shares of the samples: every sample is somebody's, in the batches that one process would make."""

import pytest
import torch

from hf_autoround.errors import CalibrationError
from hf_autoround.models.processes import Processes
from hf_autoround.streams.shares import share_of


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("samples", "batch_size"), [(16, 4), (13, 3), (7, 8), (4, 1)])
def test_every_sample_is_in_one_share_and_the_rounds_go_through_them_in_order(samples, batch_size, count):
    shares = [share_of(samples, batch_size, Processes(index, count)) for index in range(count)]
    rounds = zip(*([share.own[batch] for batch in share.batches()] for share in shares), strict=True)
    batches = [batch for each in rounds for batch in each]
    assert torch.equal(torch.cat(batches), torch.arange(samples))
    assert all(len(share.own) > 0 for share in shares)
    if samples >= batch_size * count:
        assert [len(batch) for batch in batches if len(batch)] == [
            len(batch) for batch in torch.arange(samples).split(batch_size)
        ]
    for share in shares:
        assert torch.equal(share.own[share.place[share.own]], share.own)
        some = torch.randperm(samples)
        assert sorted(share.of(some).tolist()) == share.own.tolist()


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(CalibrationError, match="3 processes cannot share 2 calibration samples: start 2 at the most"):
        share_of(2, 3, Processes(0, 3))
