# SPDX-License-Identifier: Apache-2.0
"""Laws of the streams: every tensor once, two ways to the same bits, and a kill at any moment changes nothing."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIGS, tokens

from hf_autoround import AutoRound, RoundingArguments, RoundingTrainer
from hf_autoround.models.blocks import find_sites, model_parts
from hf_autoround.models.loading import open_model
from hf_autoround.planning.resolve import resolve_plan
from hf_autoround.scheme import integer_scheme
from hf_autoround.streams.block_walk import PlannedModel, StreamSettings, units
from hf_autoround.streams.blocks import stream_blocks
from hf_autoround.streams.journal import Journal
from hf_autoround.streams.shards import FromJournal, rounded, source_keys, stream_checkpoint
from hf_autoround.tuning import ALGORITHMS, TuningSettings


class Silent:
    def block_begins(self, *arguments):
        pass

    def step_ends(self, *arguments):
        return False

    def block_decided(self, *arguments):
        return {}

    def block_ends(self, *arguments):
        pass


def planned(folder):
    lazy = open_model(folder)
    parts = model_parts(lazy.model)
    sites = [site for site in find_sites(lazy.model) if parts.block_of(site.name) is not None]
    return lazy, parts, resolve_plan(sites, integer_scheme(3, 32), blocks=parts.blocks)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shard_stream_equals_the_block_stream(name, tiny_model, tmp_path):
    lazy, parts, plan = planned(tiny_model(name))
    keys = source_keys(lazy, plan)
    journal = Journal(tmp_path / "journal", {})
    journal.start()
    model = PlannedModel(lazy, parts, plan, tokens())
    stream_blocks(model, ALGORITHMS["rtn"], TuningSettings(), StreamSettings(), journal, Silent())
    unit_of = {block: unit.key for unit in units(parts, plan, 1) for block in unit.names}
    results = FromJournal(journal, plan, lambda parameter: unit_of[parts.block_names[parts.block_of(parameter)]])
    shards = list(stream_checkpoint(lazy, keys, rounded(plan, torch.device("cpu"))))
    blocks = list(stream_checkpoint(lazy, keys, results.finished))
    assert [item.name for item in shards] == [item.name for item in blocks]
    for one, other in zip(shards, blocks, strict=True):
        if one.site is None:
            assert torch.equal(one.content, other.content)
        else:
            assert torch.equal(one.content.tensor.elements, other.content.tensor.elements)
            assert torch.equal(one.content.tensor.scale, other.content.tensor.scale)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_comes_exactly_once(name, tiny_model):
    lazy, _, plan = planned(tiny_model(name))
    items = list(stream_checkpoint(lazy, source_keys(lazy, plan), rounded(plan, torch.device("cpu"))))
    names = [item.name for item in items]
    assert len(names) == len(set(names))
    assert {item.site.name for item in items if item.site is not None} == {site.name for site in plan.sites}
    plain = {item.name for item in items if item.site is None}
    assert plain == {source.key for source in source_keys(lazy, plan) if not source.sites}


RUNS = """
    import os, sys, torch
    sys.path.insert(0, {tests!r})
    from tiny import tokens
    from hf_autoround import RoundingArguments, RoundingTrainer
    import transformers.models.qwen3_moe.modeling_qwen3_moe
    for line in sys.stdin:
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            args = RoundingArguments(
                output_dir=line.strip(), scheme="W2A16G32", format="auto_round,fake", disable_tqdm=True, **{more!r}
            )
            RoundingTrainer({model!r}, args, train_dataset=tokens(32, 32)).train(resume_from_checkpoint=True)
            break
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
"""


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# what a run has written when it is killed: exact paths, as a recursive glob fails in folders that the run renames meanwhile
JOURNAL, WRITING = ".autoround-journal", ".partial/auto_round"
BLOCKS = (f"{JOURNAL}/manifest.json", f"{JOURNAL}/block-00000.safetensors", f"{JOURNAL}/block-00001.safetensors", WRITING)
WHOLE = (
    f"{JOURNAL}/sampled.safetensors",
    f"{JOURNAL}/end_to_end/best-000000",
    f"{JOURNAL}/end_to_end/checkpoint-000004",
    f"{JOURNAL}/end_to_end/checkpoint-000008",
    WRITING,
)


@pytest.mark.parametrize(
    ("more", "moments"),
    [
        ({"iters": 40}, BLOCKS),
        ({"iters": 0}, BLOCKS),
        ({"iters": 0, "disable_opt_rtn": True, "end_to_end_steps": 12, "save_steps": 4, "self_samples": 8}, WHOLE),
    ],
    ids=["blocks", "opt_rtn", "end to end"],
)
def test_killed_and_resumed_equals_undisturbed(more, moments, tiny_model, tmp_path):
    script = textwrap.dedent(RUNS.format(tests=str(Path(__file__).parents[1]), model=str(tiny_model("qwen3_moe")), more=more))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    torn, kills = tmp_path / "torn", 0
    # one interpreter, in which torch and transformers are imported, forks a process for each run
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as runs:

        def start(folder):
            print(folder, file=runs.stdin, flush=True)
            return int(runs.stdout.readline())

        def finish(folder):
            start(folder)
            assert int(runs.stdout.readline()) == 0

        finish(tmp_path / "whole")
        for written in moments:
            process, deadline = start(torn), time.time() + 120
            while not (ended := select.select([runs.stdout], [], [], 0.001)[0]) and time.time() < deadline:
                if (torn / written).exists():
                    break
            if not ended:
                os.kill(process, signal.SIGKILL)
            kills += int(runs.stdout.readline()) == signal.SIGKILL
            assert not list(torn.glob("**/auto_round/config.json")) or not list(torn.glob(".partial/auto_round/config.json"))
        assert kills >= len(moments) - 1  # the last folder lives for a moment
        finish(torn)
        assert contents(torn) == contents(tmp_path / "whole")
        finish(torn)  # finished already: nothing happens
        assert contents(torn) == contents(tmp_path / "whole")
        runs.stdin.close()


def interrupted(model, folder, **arguments):
    """Start a run and stop it after its first block."""
    from transformers import TrainerCallback

    from hf_autoround.errors import AutoRoundError

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    args = RoundingArguments(output_dir=str(folder), group_size=32, iters=3, disable_tqdm=True, **arguments)
    with pytest.raises(AutoRoundError, match=r"stopped by a callback after model.layers.0.*resume"):
        RoundingTrainer(str(model), args, train_dataset=tokens(), callbacks=[Stop]).train()
    return args


def test_a_callback_can_stop_a_run_that_goes_on_later(tiny_model, tmp_path):
    model = tiny_model("llama")
    args = interrupted(model, tmp_path / "torn")
    assert [path.name for path in (tmp_path / "torn").iterdir()] == [".autoround-journal"]
    RoundingTrainer(str(model), args, train_dataset=tokens()).train(resume_from_checkpoint=True)
    whole = RoundingArguments(output_dir=str(tmp_path / "whole"), group_size=32, iters=3, disable_tqdm=True)
    RoundingTrainer(str(model), whole, train_dataset=tokens()).train()
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"scheme": "W3A16"}, "scheme was"),
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"iters": 4}, r"iters was 3 and is 4; lr was 0\.115\d* and is 0\.1\."),
        ({"lr": 0.05}, r"lr was 0\.115\d* and is 0\.05"),
        ({"enable_adam": False}, r"enable_adam was .*; lr was 0\.115\d* and is 0\.333"),
        ({"dataset": tokens(12)}, "dataset was"),
        ({"model": "qwen3"}, "model was"),
        ({"layer_config": {"q_proj": {"bits": 8}}}, "layers was"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_run_resumed_with_other_arguments_is_refused(change, what, tiny_model, tmp_path):
    from dataclasses import replace

    from hf_autoround.errors import ResumeError

    model = tiny_model("llama")
    args = interrupted(model, tmp_path / "torn")
    change = dict(change)
    data, other = change.pop("dataset", tokens()), tiny_model(change.pop("model", "llama"))
    with pytest.raises(ResumeError, match=what):
        RoundingTrainer(str(other), replace(args, **change), train_dataset=data).train(resume_from_checkpoint=True)
    RoundingTrainer(str(model), args, train_dataset=tokens()).train(resume_from_checkpoint=True)


def test_another_version_is_refused(tiny_model, tmp_path, monkeypatch):
    from hf_autoround.errors import ResumeError

    args = interrupted(tiny_model("llama"), tmp_path / "torn")
    monkeypatch.setattr("hf_autoround.trainer.run.__version__", "9.9")
    with pytest.raises(ResumeError, match=r'version was "0\.1\.0" and is "9\.9"'):
        RoundingTrainer(str(tiny_model("llama")), args, train_dataset=tokens()).train(resume_from_checkpoint=True)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_model, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for name, seed in (("one", 1), ("two", 1), ("three", 3)):
        AutoRound(
            str(tiny_model("llama")), scheme="W2A16G32", iters=8, seed=seed, batch_size=4, dataset=tokens(), disable_tqdm=True
        ).quantize_and_save(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state was touched"
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    one, three = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "three"))
    assert any(not torch.equal(one[key], three[key]) for key in one)


def test_tuning_never_ends_worse_than_it_began(tiny_model, tmp_path):
    args = RoundingArguments(output_dir=str(tmp_path / "out"), scheme="W2A16G32", iters=12, lr=0.5, disable_tqdm=True)
    trainer = RoundingTrainer(str(tiny_model("llama")), args, train_dataset=tokens())
    trainer.train()
    blocks = [entry for entry in trainer.state.log_history if "loss_best" in entry]
    assert len(blocks) == 3 and all(entry["loss_best"] <= entry["loss_first"] for entry in blocks)
