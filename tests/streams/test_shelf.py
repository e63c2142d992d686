# SPDX-License-Identifier: Apache-2.0
"""Tensors on a shelf: what was put there, changed in place, in memory or in files."""

import pytest
import torch

from hf_autoround.errors import OutputError
from hf_autoround.streams.shelf import Shelf

TENSORS = {"a": torch.arange(7, dtype=torch.float32), "b": torch.ones(3, 5, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)}


@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "mapped"])
def test_what_is_put_there_is_there_and_can_be_changed(mapped, tmp_path):
    shelf = Shelf(torch.device("cpu"), tmp_path if mapped else None)
    kept = shelf.keep("block", TENSORS)
    assert all(torch.equal(kept[name], tensor) and kept[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    kept["a"].add_(1)
    kept["b"].zero_()
    assert TENSORS["a"][0] == 0 and kept["a"].tolist() == list(range(1, 8)) and not kept["b"].any()
    assert [path.name for path in tmp_path.iterdir()] == (["block.mapped"] if mapped else [])


def test_a_mapped_tensor_is_the_files_memory(tmp_path):
    kept = Shelf(torch.device("cpu"), tmp_path).keep("block", TENSORS)
    kept["a"].fill_(7)
    assert (tmp_path / "block.mapped").read_bytes()[:28] == TENSORS["a"].new_full((7,), 7).numpy().tobytes()


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match=r"cannot keep .* GB in .*block.mapped: no space left on the disk"):
        Shelf(torch.device("cpu"), tmp_path).keep("block", TENSORS)
