# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a user would run it, and is short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
FLAGS = {"quantize": ["--iters", "2", "--seqlen", "32"], "lora": ["--steps", "5", "--length", "32"]}
NEEDS = {"lora": "peft"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tiny_model, tmp_path):
    assert example.read_text().count("\n") < 60
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(example), str(tiny_model("llama")), str(tmp_path / "out"), *FLAGS.get(example.stem, [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and (tmp_path / "out" / "config.json").exists()
