# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli export autoround`: found without a word to optimum, quick to explain itself, and the same job."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_autoround.cli.quantize import parser
from hf_autoround.layers.packed_linear import PackedLinear

pytest.importorskip("optimum.commands.optimum_cli")
ROOT = Path(__file__).parents[2]


def optimum_cli(*words, code="from optimum.commands.optimum_cli import main; main()"):
    """Run the command as an installed package would: both folders are on the path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_flags_are_those_of_hf_autoround():
    done = optimum_cli("export", "autoround", "--help")
    assert done.returncode == 0, done.stderr
    ours = {flag for action in parser("default", "", "")._actions for flag in action.option_strings} - {"--version"}
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout.partition("options:")[0])) >= {"--model", "--scheme"}
    assert all(flag in done.stdout for flag in ours) and "OUT" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["export", "autoround", "--help"]], ids=" ".join)
def test_help_loads_neither_torch_nor_transformers(words):
    code = """
import atexit, sys
slow = ("torch", "transformers", "hf_autoround.cli.quantize")
atexit.register(lambda: print("loaded", [name for name in slow if name in sys.modules]))
from optimum.commands.optimum_cli import main
main()
"""
    done = optimum_cli(*words, code=code)
    expected = "loaded ['hf_autoround.cli.quantize']" if "autoround" in words else "loaded []"
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    assert "export" not in words or "autoround" in done.stdout


def test_it_quantizes_a_model(tiny_model, tmp_path):
    flags = "--scheme W3A16G32 --iters 2 --end_to_end_steps 2 --self_samples 8 --dataset pydoc --seqlen 16 --nsamples 8"
    done = optimum_cli("export", "autoround", "--model", tiny_model("llama"), tmp_path / "out", *flags.split(), "--disable_tqdm")
    assert done.returncode == 0, done.stderr
    assert f"written to {tmp_path / 'out'}" in done.stdout and "W3A16G32" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 21
    assert model.config.quantization_config.bits == 3


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--model", "./nothing", "OUT"], 1, "optimum-cli export autoround: there is no folder ./nothing"),
        (["--model", "MODEL", "OUT", "--scheme", "W4A15"], 1, "no scheme is called 'W4A15'; did you mean"),
        (["--model", "MODEL"], 2, "one folder to write is needed"),
        (["--model", "MODEL", "OUT", "--output_dir", "x"], 2, "one folder to write is needed"),
        (["OUT"], 2, "--model is needed"),
        (["--model", "MODEL", "OUT", "--iter", "5"], 2, "--iter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_without_a_traceback(words, code, part, tiny_model, tmp_path):
    places = {"MODEL": tiny_model("llama"), "OUT": tmp_path / "out"}
    done = optimum_cli("export", "autoround", *(places.get(word, word) for word in words))
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert part in done.stderr and not (tmp_path / "out").exists()
