# SPDX-License-Identifier: Apache-2.0
"""Several processes and one give the same model; killed and resumed equals undisturbed; an error of one ends them all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import RoundingArguments, RoundingTrainer
from hf_autoround.evaluation import perplexity

ROOT = Path(__file__).parents[2]
QUICK = {"scheme": "W2A16G32", "iters": 6, "disable_tqdm": True, "device_map": "cpu"}
# name: architecture, samples (how many, or a dataset's name), arguments
FLOAT64 = {
    "plain": ("llama", 16, {}),
    "nothing divides": ("llama", 13, {"batch_size": 3, "nblocks": 2, "quant_lm_head": True}),
    "fewer than two batches": ("llama", 5, {"batch_size": 8}),
    "experts": ("qwen3_moe", 16, {"batch_size": 4}),
    "momentum, two batches a step": (
        "llama",
        16,
        {"batch_size": 4, "gradient_accumulate_steps": 2, "enable_adam": False, "momentum": 0.9},
    ),
    "zero points": ("llama", 16, {"sym": False}),
    "end to end": ("llama", 19, {"iters": 2, "end_to_end_steps": 4, "batch_size": 3, "quant_lm_head": True}),
    "end to end, experts": (
        "qwen3_moe",
        16,
        # from plain round to nearest: what opt_rtn makes of so small a model would stay the best
        {"iters": 0, "disable_opt_rtn": True, "end_to_end_steps": 8, "end_to_end_lr": 0.03, "batch_size": 4},
    ),
    "float inputs": ("llama", 16, {"enable_quanted_input": False}),
    "text of its own": ("qwen3_moe", "self:num=13", {"seqlen": 24, "batch_size": 4}),
}
ANY_TYPE = {
    "experts, opt_rtn": ("qwen3_moe", 13, {"iters": 0, "batch_size": 4}),
    "opt_rtn": ("llama", 13, {"iters": 0, "batch_size": 3}),
    "rtn": ("llama", 16, {"iters": 0, "disable_opt_rtn": True}),
}
FLOAT32 = {"W4": ("llama", 32, {"scheme": "W4A16G32", "iters": 20, "batch_size": 4})}
TORN = {"scheme": "W2A16G32", "iters": 30, "disable_tqdm": True, "format": "auto_round,fake"}

SCRIPT = """
import json, os, sys
import torch
from tiny import tokens
from transformers.utils import logging
from hf_autoround import RoundingArguments, RoundingTrainer
torch.set_num_threads(1)
logging.set_verbosity_error()
open(f"{sys.argv[2]}-pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
for folder, (model, rows, arguments) in json.loads(sys.argv[1]).items():
    data = tokens(rows) if isinstance(rows, int) else rows
    trainer = RoundingTrainer(model, RoundingArguments(output_dir=folder, **arguments), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)
"""

EXCHANGES = """
from hf_autoround.errors import CheckpointError
from hf_autoround.models.processes import FailedElsewhere, join
processes = join()
second = not processes.main
def raised(work):
    try:
        work()
    except CheckpointError as error:
        return f"mine: {error}"
    except FailedElsewhere as error:
        return f"theirs: {error}"
def fail():
    raise CheckpointError("damaged")
def second_fails():
    with processes.together():
        if second:
            fail()
def second_fails_while_the_first_gathers():
    with processes.together():
        if second:
            fail()
        processes.gather(1)
said = [raised(second_fails), raised(second_fails_while_the_first_gathers), raised(lambda: processes.from_main(fail))]
said += [processes.any(second), processes.any(False), processes.from_main(lambda: processes.index)]
said += [processes.total(torch.tensor([1.5, processes.index], dtype=torch.float64)).tolist()]
open(f"{sys.argv[2]}-{processes.index}", "w").write(json.dumps(said))
"""

ON_LOAD = """
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from hf_autoround import AutoRoundConfig
from hf_autoround.streams.journal import Journal
def elsewhere(self, *which):
    raise FileNotFoundError("the journal is on another machine")
if second:
    Journal.get = elsewhere
config = AutoRoundConfig(**json.loads(sys.argv[4]), dataset=list(tokens(16)))
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], quantization_config=config)
save_file(model.state_dict(), f"{sys.argv[2]}-loaded-{processes.index}")  # save_pretrained writes in one process only
"""


def launch(*words):
    """Start two processes as torchrun does."""
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.Popen([*torchrun, *words], env=environment, text=True, stderr=subprocess.PIPE)


def ended(process):
    """Return the exit code and what was said on standard error."""
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        raise
    return process.returncode, err


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """The folder where two processes wrote every case, and a model that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two")
    cases = {}
    for bits, dtype, group in (
        ("64", torch.float64, FLOAT64),
        ("32", torch.float32, {**ANY_TYPE, **FLOAT32}),
        ("16", torch.bfloat16, ANY_TYPE),
    ):
        for name, (architecture, rows, arguments) in group.items():
            cases[str(folder / f"{name} {bits}")] = (str(tiny_model(architecture, dtype)), rows, {**QUICK, **arguments})
    cases[str(folder / "whole")] = (str(tiny_model("qwen3_moe")), 16, TORN)
    (folder / "script.py").write_text(SCRIPT + EXCHANGES + ON_LOAD)
    on_load = str(tiny_model("qwen3_moe", torch.float64)), json.dumps(QUICK)
    code, err = ended(launch(folder / "script.py", json.dumps(cases), folder / "said", *on_load))
    assert code == 0, err
    return folder


def alone(model, folder, rows, arguments):
    args = RoundingArguments(output_dir=str(folder), **{**QUICK, **arguments})
    RoundingTrainer(str(model), args, train_dataset=tokens(rows) if isinstance(rows, int) else rows).train()
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", FLOAT64)
def test_two_processes_give_the_bits_of_one_in_float64(name, two, tiny_model, tmp_path):
    architecture, rows, arguments = FLOAT64[name]
    one = alone(tiny_model(architecture, torch.float64), tmp_path / "one", rows, arguments)
    assert same(one, load_file(two / f"{name} 64" / "model.safetensors"))
    untuned = alone(
        tiny_model(architecture, torch.float64), tmp_path / "untuned", rows, {**arguments, "iters": 0, "end_to_end_steps": 0}
    )
    assert any(not torch.equal(tensor, untuned[key]) for key, tensor in one.items() if key.endswith("qweight"))


@pytest.mark.parametrize("process", [0, 1])
def test_a_model_that_two_processes_calibrate_while_it_loads_is_that_of_one_in_each(process, two, tiny_model, tmp_path):
    one = alone(tiny_model("qwen3_moe", torch.float64), tmp_path / "one", 16, {})
    assert same(one, load_file(two / f"said-loaded-{process}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ANY_TYPE)
def test_what_is_not_tuned_is_the_same_bits_in_every_type(name, dtype, two, tiny_model, tmp_path):
    architecture, rows, arguments = ANY_TYPE[name]
    one = alone(tiny_model(architecture, dtype), tmp_path / "one", rows, arguments)
    assert same(one, load_file(two / f"{name} {dtype.itemsize * 8}" / "model.safetensors"))


def test_two_processes_give_the_perplexity_of_one_in_float32(two, tiny_model, tmp_path):
    architecture, rows, arguments = FLOAT32["W4"]
    alone(tiny_model(architecture), tmp_path / "one", rows, arguments)
    held_out = tokens(64)[32:]
    scores = [
        perplexity(AutoModelForCausalLM.from_pretrained(folder), held_out)
        for folder in (tmp_path / "one", two / "W4 32", tiny_model(architecture))
    ]
    assert scores[0] != scores[2] and abs(scores[0] / scores[1] - 1) < 0.01, scores


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_together_and_resumed_equals_undisturbed(two, tiny_model, tmp_path):
    torn = tmp_path / "torn"
    cases = json.dumps({str(torn): (str(tiny_model("qwen3_moe")), 16, TORN)})
    (tmp_path / "script.py").write_text(SCRIPT)

    def start():
        return launch(tmp_path / "script.py", cases, tmp_path / "two")

    process = start()
    while process.poll() is None and not list(torn.glob("**/block-00001.safetensors")):
        time.sleep(0.005)
    for number in (0, 1):
        os.kill(int(Path(f"{tmp_path / 'two'}-pid-{number}").read_text()), signal.SIGKILL)
    assert ended(process)[0] != 0
    assert [path.name for path in torn.iterdir()] == [".autoround-journal"]
    code, err = ended(start())
    assert code == 0, err
    assert contents(torn) == contents(two / "whole")


def test_an_error_of_one_process_is_raised_in_all_of_them(two):
    first, second = (json.loads(Path(f"{two / 'said'}-{number}").read_text()) for number in (0, 1))
    assert first[:3] == ["theirs: damaged", "theirs: damaged", "mine: damaged"]
    assert second[:3] == ["mine: damaged", "mine: damaged", "theirs: damaged"]
    assert first[3:] == second[3:] == [True, False, 0, [3.0, 1.0]]


def test_the_command_line_says_what_is_wrong_once_and_ends(tiny_model, tmp_path):
    process = launch(
        *("-m", "hf_autoround", "--model", str(tiny_model("llama")), "--output_dir", str(tmp_path / "out")),
        *("--device_map", "0,1", "--dataset", "pydoc"),
    )
    code, err = ended(process)
    assert code != 0 and not (tmp_path / "out").exists()
    assert err.count("hf-autoround: device_map='0,1' with several processes: each works on the device") == 1
    assert 'hf_autoround/cli/main.py", line' not in err, "a traceback of ours"
