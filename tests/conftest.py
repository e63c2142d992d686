# SPDX-License-Identifier: Apache-2.0
"""What the tests share: quiet logs, no network, tiny models made once, and the optional folder of test data."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # side by side, also in the processes that tests start, more threads wait for cores
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the Hub fails at once instead of trying for half a minute

from pathlib import Path

import pytest
import torch
from tiny import make
from transformers.utils import logging

import hf_autoround  # noqa: F401

SHARED = Path(__file__).parents[2] / "shared"


# files that take half a minute or more, the longest first: side by side they have to begin early
LONG = (
    "test_triton.py", "test_data_parallel.py", "test_real_models.py", "test_streams.py", "test_end_to_end.py", "test_backends.py",
    "test_cli.py", "test_packaging.py", "test_examples.py", "test_peft.py", "test_trainer.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="session")
def quiet():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A function: architecture (and dtype) -> folder of a tiny model."""
    made: dict = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = make(name, tmp_path_factory.mktemp("models") / f"{name}-{str(dtype)[6:]}", dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def shared():
    """The optional folder of real models, texts and checkpoints."""
    if not SHARED.is_dir():
        pytest.skip("there is no folder of shared test data beside the project")
    return SHARED


@pytest.fixture(scope="session")
def other_device():
    """A second kind of device: torch's lazy backend, which every build has: other memory, the same arithmetic."""
    pytest.importorskip("torch._lazy.ts_backend").init()
    return torch.device("lazy:0")
