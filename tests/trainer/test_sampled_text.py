# SPDX-License-Identifier: Apache-2.0
"""Runs on text that the model writes itself: every spelling, the same bytes again, also when resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tokens
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_autoround import AutoRound, AutoRoundConfig, RoundingArguments, RoundingTrainer
from hf_autoround.cli.main import main
from hf_autoround.errors import AutoRoundError, CalibrationError
from hf_autoround.trainer import trainer as trainer_module

QUICK = {"scheme": "W2A16G32", "iters": 3, "nsamples": 8, "seqlen": 16, "disable_tqdm": True}


def arguments(folder, **changes):
    return RoundingArguments(output_dir=str(folder), **{**QUICK, **changes})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def words(folder):
    (folder / "text.txt").write_text(" ".join(f"w{3 + place * 7 % 120}" for place in range(500)))
    return str(folder / "text.txt")


@pytest.mark.parametrize("iters", [3, 0], ids=["tuned", "searched"])
def test_every_spelling_gives_the_same_tensors(iters, tiny_model, tmp_path):
    folder, dataset = tiny_model("qwen3"), f"{words(tmp_path)}:num=4,self:num=6"
    flags = ["--scheme", "W2A16G32", "--iters", str(iters), "--seqlen", "16", "--disable_tqdm", "--dataset", dataset]
    assert main(["--model", str(folder), "--output_dir", str(tmp_path / "cli"), *flags]) == 0
    shared = {**QUICK, "iters": iters}
    AutoRound(str(folder), dataset=dataset, **shared).quantize_and_save(tmp_path / "short")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=AutoRoundConfig(dataset=dataset, **shared))
    model.save_pretrained(tmp_path / "loaded")
    results = [load_file(tmp_path / name / "model.safetensors") for name in ("cli", "short", "loaded")]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(tensor, results[0][name]) for name, tensor in other.items())
    AutoRound(str(folder), dataset=f"{words(tmp_path)}:num=4", **shared).quantize_and_save(tmp_path / "without")
    without = load_file(tmp_path / "without" / "model.safetensors")
    assert any(not torch.equal(tensor, results[0][name]) for name, tensor in without.items())
    assert (
        "4 x 16 tokens of text.txt (1 document) and 6 x 16 tokens sampled from the model itself (seed 42)"
        in (tmp_path / "cli" / "README.md").read_text()
    )


def test_it_needs_no_data_and_no_tokenizer(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    for file in model.glob("tokenizer*"):
        file.unlink()
    RoundingTrainer(str(model), arguments(tmp_path / "out", dataset="self")).train()
    assert "8 x 16 tokens sampled from the model itself" in (tmp_path / "out" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(tokens(1, 4), max_new_tokens=3).shape == (1, 7)


class Stop(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_resumed_run_reads_what_was_sampled_and_ends_in_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    model, sampled = str(tiny_model("qwen3_moe")), []
    original = trainer_module.sample_text

    def counted(*given, **named):
        sampled.append(original(*given, **named))
        return sampled[-1]

    monkeypatch.setattr(trainer_module, "sample_text", counted)
    dataset = f"{words(tmp_path)},self:num=5"
    with pytest.raises(AutoRoundError, match="resume"):
        RoundingTrainer(model, arguments(tmp_path / "torn", dataset=dataset), callbacks=[Stop]).train()
    kept = load_file(tmp_path / "torn" / ".autoround-journal" / "sampled.safetensors")["tokens"]
    assert len(sampled) == 1 and torch.equal(kept, sampled[0]) and kept.shape == (5, 16)
    with monkeypatch.context() as patched:  # nor does it ask whether there would be room for it
        patched.setattr("hf_autoround.trainer.run.refuse_sampling", lambda *given: "it takes more memory than is free")
        RoundingTrainer(model, arguments(tmp_path / "torn", dataset=dataset)).train(resume_from_checkpoint=True)
    assert len(sampled) == 1, "a resumed run sampled again"
    RoundingTrainer(model, arguments(tmp_path / "whole", dataset=dataset)).train()
    assert len(sampled) == 2 and contents(tmp_path / "torn") == contents(tmp_path / "whole")
    assert not (tmp_path / "whole" / ".autoround-journal").exists()


def test_another_request_is_another_run(tiny_model, tmp_path):
    model = str(tiny_model("llama"))
    with pytest.raises(AutoRoundError, match="resume"):
        RoundingTrainer(model, arguments(tmp_path / "torn", dataset="self"), callbacks=[Stop]).train()
    with pytest.raises(AutoRoundError, match=r"dataset was .*seed 42.* and is .*seed 7"):
        RoundingTrainer(model, arguments(tmp_path / "torn", dataset="self:seed=7")).train(resume_from_checkpoint=True)


def test_the_caller_s_model_and_random_state_stay_as_they_are(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama_tied"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configuration = json.dumps(model.generation_config.to_dict(), default=str)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    AutoRound(model, dataset="self", **QUICK).quantize_and_save(tmp_path / "memory")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert json.dumps(model.generation_config.to_dict(), default=str) == configuration
    AutoRound(str(tiny_model("llama_tied")), dataset="self", **QUICK).quantize_and_save(tmp_path / "files")
    memory, files = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "files"))
    assert all(torch.equal(files[name], tensor) for name, tensor in memory.items())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("self:num=0", "num=0"), ("self:nums=4", "did you mean num"), ("foo:num=2", "dataset '?foo")],
)
def test_what_cannot_be_meant_is_said_before_any_work(dataset, message, tiny_model, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        RoundingTrainer(str(tiny_model("llama")), arguments(tmp_path / "out", dataset=dataset)).train()
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_to_sample_from_is_refused_before_any_work(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_autoround.calibration.sampling.get_max_memory", lambda: {"cpu": 1000, 0: 1000})
    with pytest.raises(CalibrationError, match=r"no text can be sampled from .*llama.* use self_samples=0"):
        RoundingTrainer(str(tiny_model("llama")), arguments(tmp_path / "out", dataset="self")).train()
    assert not (tmp_path / "out").exists()
