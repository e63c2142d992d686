# SPDX-License-Identifier: Apache-2.0
"""One process needs no launcher; what several do together is tested in tests/trainer/test_data_parallel.py."""

import pytest
import torch

from hf_autoround.errors import AutoRoundError, CheckpointError
from hf_autoround.models.processes import Processes, join


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "4", "RANK": "1"}], ids=str)
def test_a_process_that_no_launcher_started_is_alone(environment, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert join() == Processes()


def test_alone_everything_is_its_own():
    alone, tensor = Processes(), torch.ones(3)
    assert alone.main and alone.total(tensor) is tensor and alone.gather(5) == [5]
    assert alone.any(True) and not alone.any(False) and alone.from_main(lambda: 7) == 7
    with pytest.raises(CheckpointError, match="damaged"), alone.together():
        raise CheckpointError("damaged")


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(AutoRoundError, match="process 2 of this machine has no device, there are 2"):
        join()
