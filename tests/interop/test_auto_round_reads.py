# SPDX-License-Identifier: Apache-2.0
"""auto-round's own loader reads `auto_round` checkpoints and computes what our loader computes.

Runs under `make test-auto-round`, which makes an environment with auto-round 0.16.1, or where auto_round can be imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig

ENVIRONMENT = os.environ.get("AUTO_ROUND_ENVIRONMENT")
pytestmark = pytest.mark.skipif(ENVIRONMENT is None and find_spec("auto_round") is None, reason="make test-auto-round runs this")

INTEGERS = {
    **{name: {"scheme": name} for name in ("W2A16G32", "W3A16G32", "W4A16", "W8A16")},
    # at 4 bits asymmetric weights lie as AWQ's, which it loads as random weights on a CPU without auto-round-lib
    **{f"{name}-asym": {"scheme": name, "sym": False} for name in ("W2A16G32", "W8A16")},
    "mixed": {"scheme": "W4A16", "layer_config": {"o_proj": {"bits": 8}, "down_proj": {"bits": 16}}},
}
# it rounds the exponents of these types' inputs down always, which is not what vLLM and compressed-tensors do
OTHER_INPUTS = ("MXFP4", "MXFP8", "MXINT4")
FLOATS = {name: {"scheme": name} for name in (*OTHER_INPUTS, "MXFP4_RCEIL", "MXFP8_RCEIL", "NVFP4")}
FLOATS["MXFP4_RCEIL and 16 bits"] = {"scheme": "MXFP4_RCEIL", "layer_config": {"o_proj": {"bits": 16}}}


def computed_by_auto_round(folder, rows, dtype):
    """Return its logits, and those with inputs that are left alone."""
    python = Path(ENVIRONMENT) / "bin" / "python" if ENVIRONMENT else sys.executable
    question, answer = folder / "rows.safetensors.tmp", folder / "logits.safetensors.tmp"
    save_file({"rows": rows.contiguous()}, question)
    done = subprocess.run(
        [python, Path(__file__).parent / "auto_round_loader" / "logits.py", folder, dtype, question, answer],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return load_file(answer)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def written(tiny_model, folder, **arguments):
    source = tiny_model("llama_wide", torch.bfloat16)
    AutoRound(str(source), recipe="rtn", dataset=tokens(), disable_tqdm=True, **arguments).quantize_and_save(folder)
    return folder


def ours(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=AutoRoundConfig(backend="torch"))


@pytest.mark.parametrize("arguments", [*INTEGERS.values(), {"scheme": "FP8_STATIC"}], ids=[*INTEGERS, "FP8_STATIC"])
def test_its_loader_computes_our_logits_in_bfloat16(arguments, tiny_model, tmp_path):
    folder, rows = written(tiny_model, tmp_path, **arguments), tokens()[:2]
    with torch.no_grad():
        expected = ours(folder, torch.bfloat16)(rows).logits.float()
    error = relative(computed_by_auto_round(folder, rows, "bfloat16")["logits"], expected)
    print(f"{error:.1e}")
    assert error < 0.03  # auto-round-lib, where it is installed, rounds the inputs of integers to 8 bits


@pytest.mark.parametrize("case", FLOATS)
def test_its_loader_computes_our_logits_in_float32(case, tiny_model, tmp_path):
    folder, rows = written(tiny_model, tmp_path, **FLOATS[case]), tokens()[:2]
    model, found = ours(folder, torch.float32), computed_by_auto_round(folder, rows, "float32")
    if case in OTHER_INPUTS:
        model.dequantize()
    with torch.no_grad():
        error = relative(found["weights alone" if case in OTHER_INPUTS else "logits"], model(rows).logits)
    assert error < 1e-5
