# SPDX-License-Identifier: Apache-2.0
"""The command line: help that teaches, near names, exit codes, and never a traceback."""

import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from hf_autoround import __version__
from hf_autoround.cli.main import best, e2e, e2e_best, e2e_light, light, main, opt_rtn, rtn
from hf_autoround.scheme import PRESETS
from hf_autoround.trainer.arguments import RECIPES, recipe


def run(*words):
    """Return exit code; SystemExit counts as its code."""
    try:
        return main(list(words))
    except SystemExit as stop:
        return stop.code


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "hf_autoround", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"hf-autoround {__version__}")


def test_help_names_every_flag_and_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for part in (
        "--scheme",
        "--output_dir",
        "--resume",
        "--asym",
        "list formats",
        "demo",
        "hf-autoround-best",
        "[200]",
        "--fp_layers",
    ):
        assert part in text, part


@pytest.mark.parametrize(("what", "part"), [("formats", "auto_round"), ("schemes", "W2A16G64"), ("backends", "torch")])
def test_lists(what, part, capsys):
    assert run("list", what) == 0
    assert part in capsys.readouterr().out


def test_the_list_of_formats_is_the_registries_product(capsys):
    run("list", "formats")
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{scheme.name} ") for line in lines) for scheme in PRESETS if scheme.weight)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "--model is needed"),
        (("--model",), "expected one argument"),
        (("--modle", "x"), "there is no flag --modle; did you mean --model"),
        (("--model", "x", "--iter", "5"), "there is no flag --iter; did you mean --iters"),
        (("--model", "x", "--iters", "many"), "invalid int value"),
        (("list", "format"), "there is no list format; did you mean formats"),
        (("quantise",), "there is no command quantise; did you mean quantize"),
        (("--model", "x", "--push_to_hub"), "--push_to_hub needs --hub_model_id"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_understood_exits_with_2_and_names_the_near_word(words, part, capsys):
    assert run(*words) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--model", "./nothing"), "there is no folder ./nothing"),
        (("--model", "MODEL", "--scheme", "W4A15"), "no scheme is called 'W4A15'; did you mean"),
        (("--model", "MODEL", "--format", "auto_rond"), "no format is called 'auto_rond'; did you mean"),
        (("--model", "MODEL", "--layer_config", "{'x': {'bits': 4}}"), "no layer matches 'x'"),
        (("--model", "MODEL", "--dataset", "nothing.txt"), "there is no calibration file nothing.txt"),
        (("--model", "MODEL"), "the Hub is out of reach; pass a local text"),
        (("--model", "MODEL", "--iters", "-3"), "iters=-3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_exits_with_1_and_one_sentence(words, part, capsys, tiny_model, tmp_path):
    words = [str(tiny_model("llama")) if word == "MODEL" else word for word in words]
    assert run(*words, "--output_dir", str(tmp_path / "out")) == 1
    err = capsys.readouterr().err
    assert part in err and err.startswith("hf-autoround: ") and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_flags_reach_the_run(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--bits", "3", "--group_size", "32", "--asym", "--ignore_layers", "o_proj,k_proj", "--no-enable_norm_bias_tuning"]
    more = [
        "--iters",
        "2",
        "--dataset",
        "pydoc",
        "--seqlen",
        "16",
        "--nsamples",
        "8",
        "--layer_config",
        "{'v_proj': {'bits': 8}}",
    ]
    assert run("quantize", str(tiny_model("llama")), "--output_dir", str(out), *flags, *more) == 0
    assert f"written to {out}" in capsys.readouterr().out
    config = AutoModelForCausalLM.from_pretrained(out).config.quantization_config.to_dict()
    assert (config["bits"], config["group_size"], config["sym"]) == (3, 32, False)
    extra = config["extra_config"]
    assert extra["model.layers.0.self_attn.o_proj"]["bits"] == 16 and extra["model.layers.0.self_attn.v_proj"]["bits"] == 8
    assert run("--model", str(tiny_model("llama")), "--output_dir", str(out), "--dataset", "pydoc") == 1
    assert "is not empty" in capsys.readouterr().err


def test_recipes_have_commands(capsys):
    for command in (best, e2e, e2e_best, e2e_light, light, opt_rtn, rtn):
        with pytest.raises(SystemExit):
            sys.argv = ["hf-autoround", "--help"]
            command()
        assert "hf-autoround-" in capsys.readouterr().out
    assert recipe("best").iters == 1000 and recipe("light").iters == 50 and recipe("rtn").algorithm == "rtn"
    assert recipe("opt-rtn").algorithm == "opt_rtn"
    steps = {name: recipe(name).end_to_end_steps for name in ("e2e", "e2e-light", "e2e-best", "default")}
    assert steps == {"e2e": 250, "e2e-light": 50, "e2e-best": 1000, "default": 0}
    assert recipe("e2e-light").batch_size == 8 and recipe("e2e-best").batch_size == 6
    assert recipe("e2e-best", batch_size=8).batch_size == 8
    assert set(RECIPES) == {"default", "best", "light", "e2e", "e2e-light", "e2e-best", "opt-rtn", "rtn"}


def test_the_demo_runs_and_tuning_helps(capsys, tmp_path):
    assert run("demo", "--steps", "120", "--iters", "25", "--output_dir", str(tmp_path)) == 0
    table = capsys.readouterr().out
    cells = [line.split() for line in table.splitlines() if line.startswith(("W4A16 ", "W2A16G64 "))]
    rows = {(scheme, method): float(score) for scheme, method, _, _, score, _ in cells}
    assert len(rows) == 6 and rows["W2A16G64", "sign_round"] < rows["W2A16G64", "rtn"]
    assert "goes on from" in table
