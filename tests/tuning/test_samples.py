# SPDX-License-Identifier: Apache-2.0
"""The order of samples: each as often as any other, and from all over the set in every step."""

from itertools import islice

import pytest
import torch

from hf_autoround.models.processes import Processes
from hf_autoround.streams.shares import share_of
from hf_autoround.tuning.samples import batches, split


def steps(samples, count, **sizes):
    return list(islice(batches(samples, 7, **sizes), count))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_every_share_has_as_much_to_do_in_every_step(processes):
    training, selection = split(128, 16)
    shares = [share_of(128, 8, Processes(index, processes)) for index in range(processes)]
    for micro_batches in [[selection], *steps(training, 30, batch_size=8)]:
        for indices in micro_batches:
            assert {len(share.of(indices)) for share in shares} == {len(indices) // processes}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (1, 1), (3, 2), (100, 1)])
def test_a_pass_takes_samples_once_and_passes_differ(batch_size, accumulate):
    training, _ = split(45, 16)
    size = min(len(training), batch_size * accumulate)
    passes = len(training) // size
    every = steps(training, 40 * passes, batch_size=batch_size, accumulate=accumulate)
    assert all(sum(map(len, step)) == size for step in every)
    taken = [torch.cat([torch.cat(step) for step in every[start : start + passes]]) for start in range(0, len(every), passes)]
    assert all(len(set(each.tolist())) == len(each) for each in taken)
    assert len({tuple(each.tolist()) for each in taken}) > 30
    counts = torch.cat(taken).bincount(minlength=45)[training]
    assert counts.min() >= 20, "a sample is left out more often than not"
    assert torch.equal(torch.cat(every[0]), torch.cat(steps(training, 1, batch_size=batch_size, accumulate=accumulate)[0]))
