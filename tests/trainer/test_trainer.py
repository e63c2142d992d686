# SPDX-License-Identifier: Apache-2.0
"""RoundingTrainer and AutoRound: three spellings, one result; a Trainer's manners; mistakes answered before any work."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tokenizer, tokens
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_autoround import AutoRound, RoundingArguments, RoundingTrainer
from hf_autoround.cli.main import main
from hf_autoround.errors import (
    AutoRoundError,
    CheckpointError,
    MissingDependency,
    OutputError,
    UnknownName,
    UnsupportedLayer,
    UnsupportedScheme,
)
from hf_autoround.layers.fake_quantized_block import InputStatistics

QUICK = {"iters": 3, "group_size": 32, "disable_tqdm": True}


def trainer(model, folder, **arguments):
    arguments = {**QUICK, **arguments}
    dataset, callbacks = arguments.pop("train_dataset", tokens()), arguments.pop("callbacks", None)
    return RoundingTrainer(
        model, RoundingArguments(output_dir=str(folder), **arguments), train_dataset=dataset, callbacks=callbacks
    )


def test_three_spellings_and_a_model_in_memory_give_the_same_tensors(tiny_model, tmp_path):
    folder = tiny_model("qwen3_moe")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + place * 7 % 120}" for place in range(500)))
    flags = ["--scheme", "W3A16", "--group_size", "32", "--iters", "3", "--nsamples", "8", "--seqlen", "24", "--disable_tqdm"]
    assert main(["--model", str(folder), "--output_dir", str(tmp_path / "cli"), "--dataset", str(text), *flags]) == 0
    arguments = {"scheme": "W3A16", "nsamples": 8, "seqlen": 24, **QUICK}
    AutoRound(str(folder), dataset=str(text), **arguments).quantize_and_save(tmp_path / "short", format="auto_round")
    trainer(str(folder), tmp_path / "trainer", train_dataset=str(text), **arguments).train()
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    AutoRound(model, tokenizer(), dataset=str(text), **arguments).quantize_and_save(tmp_path / "memory")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the model was changed"
    results = [load_file(tmp_path / name / "model.safetensors") for name in ("cli", "short", "trainer", "memory")]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(tensor, results[0][name]) for name, tensor in other.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "memory").generate(tokens(1, 4), max_new_tokens=3)


def test_quantize_returns_the_model_and_save_quantized_writes_it_later(tiny_model, tmp_path):
    rounding = AutoRound(
        str(tiny_model("llama")), scheme={"bits": 4, "group_size": 32}, dataset=tokens(), iters=3, disable_tqdm=True
    )
    with pytest.raises(AutoRoundError, match="call quantize\\(\\) first"):
        rounding.save_quantized(tmp_path / "early")
    model, layers = rounding.quantize()
    assert len(layers) == 21 and set(map(str, (scheme["bits"] for scheme in layers.values()))) == {"4"}
    rounding.save_quantized(tmp_path / "saved", "auto_round")
    rounding.quantize_and_save(tmp_path / "again", "fake")
    rows = tokens(2, 10)
    for name in ("saved", "again"):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(other(rows).logits, model(rows).logits, rtol=0, atol=1e-6)


class Recorder(TrainerCallback):
    def __init__(self):
        self.events, self.logs, self.losses = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("begin", state.max_steps, state.num_train_epochs))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.events.append(("block", kwargs["block"], state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))
        self.losses.append(kwargs["loss"])

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append(("done", state.epoch, state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))


def test_an_epoch_is_a_block_and_a_step_an_iteration(tiny_model, tmp_path):
    recorder = Recorder()
    run = trainer(str(tiny_model("llama")), tmp_path / "out", logging_steps=2, callbacks=[recorder])
    output = run.train()
    blocks = [
        event
        for place in range(3)
        for event in (
            ("block", f"model.layers.{place}", float(place)),
            *(("step", 3 * place + step) for step in (1, 2, 3)),
            ("done", place + 1.0, 3 * place + 3),
        )
    ]
    assert recorder.events == [("begin", 9, 3), *blocks, ("end", 9)]
    assert output.global_step == 9 and output.metrics["quantized_layers"] == 21 and output.training_loss > 0
    assert [log["step"] for log in recorder.logs if "learning_rate" in log] == [2, 4, 6, 8]
    assert all(loss == loss for loss in recorder.losses)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["log_history"] == run.state.log_history
    assert [entry["block"] for entry in state["log_history"] if "block" in entry] == [
        f"model.layers.{place}" for place in range(3)
    ]


def test_a_callback_can_end_a_block_early(tiny_model, tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 3 == 1:
                control.should_epoch_stop = True

    recorder = Recorder()
    trainer(str(tiny_model("llama")), tmp_path / "out", callbacks=[recorder, Enough]).train()
    assert [event[1] for event in recorder.events if event[0] == "step"] == [1, 4, 7]


@pytest.mark.parametrize(
    "arguments",
    [
        {"nblocks": 2},
        {"enable_adam": False, "momentum": 0.9},
        {"enable_adam": False},
        {"enable_minmax_tuning": False},
        {"enable_norm_bias_tuning": False},
        {"enable_quanted_input": False},
        {"gradient_accumulate_steps": 2, "batch_size": 4},
        {"lr": 0.02, "minmax_lr": 0.001},
        {"low_gpu_mem_usage": True},
        {"disable_amp": True},
        {"iters": 0},
        {"iters": 0, "disable_opt_rtn": True},
        {"device_map": "auto"},
        {"device_map": {"": "cpu", "q_proj": "cpu"}},
        {"device_map": ["cpu", "cpu"]},
        {"sym": False},
    ],
    ids=str,
)
def test_every_tunable_changes_what_it_should(arguments, tiny_model, tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    shared = {"iters": 10, "scheme": "W2A16G32"}  # at 2 bits the first steps already improve on the start
    if arguments.get("device_map", "auto") != "auto":
        shared["device_map"] = "cpu"  # where those stay, too: a GPU would give other bits
    trainer(str(model), tmp_path / "plain", **shared).train()
    trainer(str(model), tmp_path / "other", **{**shared, **arguments}).train()
    plain, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "other"))
    same = plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
    assert same == ("low_gpu_mem_usage" in arguments or "device_map" in arguments)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
@pytest.mark.parametrize("arguments", [{"iters": 0}, {"iters": 4}, {"iters": 0, "end_to_end_steps": 4}], ids=str)
def test_a_block_may_be_spread_over_an_accelerator_and_the_cpu(arguments, tiny_model, tmp_path):
    trainer(str(tiny_model("llama")), tmp_path / "out", device_map={"k_proj": "cpu"}, **arguments).train()
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()[:1]).logits).all()


def test_norms_are_tuned_by_default_and_keep_their_type(tiny_model, tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    trainer(str(model), tmp_path / "out", iters=12, scheme="W2A16G32").train()
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    norms = [name for name in before if "layernorm" in name]
    assert norms and all(after[name].dtype == torch.bfloat16 for name in norms)
    assert any(not torch.equal(before[name], after[name]) for name in norms)
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_head_is_quantized_when_asked_for(name, tiny_model, tmp_path):
    model, folder = tiny_model(name), tmp_path / "out"
    trainer(str(model), folder, quant_lm_head=True).train()
    assert "lm_head.qweight" in load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["extra_config"]["lm_head"] == {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    rows = tokens(2, 12)
    exact = AutoModelForCausalLM.from_pretrained(model)(rows).logits
    packed = AutoModelForCausalLM.from_pretrained(folder)(rows).logits
    assert 0 < ((packed - exact).norm() / exact.norm()).item() < 0.4


def test_a_tied_head_is_refused(tiny_model, tmp_path):
    with pytest.raises(UnsupportedLayer, match=r"lm_head of .* shares its weight with the input embedding"):
        trainer(str(tiny_model("llama_tied")), tmp_path / "out", quant_lm_head=True).train()
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def with_an_idle_expert(tiny_model, tmp_path_factory):
    """A folder of a model whose routers send each token to one of experts 0 and 2, or to 1, and never to 3."""
    folder = tmp_path_factory.mktemp("idle") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3_moe"), num_experts_per_tok=1)
    for layer in model.model.layers[1:]:
        rows = layer.mlp.gate.weight.data
        rows[1], rows[3] = -rows[0], 0  # of a and -a one is above 0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        {"iters": 0},
        {"iters": 6},
        {"iters": 6, "enable_adam": False},
        {"iters": 6, "enable_adam": False, "momentum": 0.9, "sym": False},
    ],
    ids=["searched", "tuned", "by the sign", "momentum, zero points"],
)
def test_an_expert_that_no_token_reaches_is_rounded_to_nearest(arguments, with_an_idle_expert, tmp_path):
    shared = {"scheme": "W3A16", **arguments}
    run = trainer(str(with_an_idle_expert), tmp_path / "out", **shared)
    run.train()
    trainer(str(with_an_idle_expert), tmp_path / "rtn", **{**shared, "iters": 0}, disable_opt_rtn=True).train()
    found, nearest = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "rtn"))
    assert found.keys() == nearest.keys()
    blocks = [entry for entry in run.state.log_history if "expert_tokens" in entry]
    assert len(blocks) == 2
    for place, block in enumerate(blocks, 1):
        (counts,) = block["expert_tokens"].values()
        reached = [count > 0 for count in counts]
        assert not reached[3] and any(reached) and "rounded without data: " in block["experts"]
        for expert, seen in enumerate(reached):
            names = [name for name in found if f"layers.{place}.mlp.experts.{expert}." in name]
            same = [torch.equal(found[name], nearest[name]) for name in names]
            assert len(same) == 9 and (all(same) or seen)
            assert not (seen and all(same)), "nothing was decided"


def test_experts_without_tokens_are_rounded_and_reported(tiny_model, tmp_path):
    run = trainer(str(tiny_model("qwen3_moe")), tmp_path / "out", train_dataset=torch.full((8, 8), 5), iters=4)
    run.train()
    blocks = [entry for entry in run.state.log_history if "block" in entry]
    assert "experts" not in blocks[0] and "rounded without data: 0, 1" in blocks[1]["experts"]
    counts = blocks[1]["expert_tokens"]["model.layers.1.mlp.experts"]
    assert counts[:2] == [0, 0] and min(counts[2:]) > 0
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens(2, 10)).logits
    assert torch.isfinite(logits).all()


def test_datasets_and_names_are_taken(tiny_model, tmp_path):
    data = datasets.Dataset.from_dict({"text": ["w5 w6 w7 w8 w9 w10"] * 40})
    run = trainer(str(tiny_model("llama")), tmp_path / "out", train_dataset=data, nsamples=4, seqlen=16)
    run.train()
    assert "4 x 16 tokens of a Dataset" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"iters": 4}, ["| optimizer | Adam |", "| lr | 0.1 |"]),
        (
            {"iters": 4, "enable_adam": False, "momentum": 0.5, "enable_norm_bias_tuning": False},
            ["| optimizer | sign of the gradient, momentum 0.5 |", "| lr | 0.25 |", "| enable_norm_bias_tuning | False |"],
        ),
    ],
    ids=["default", "sign"],
)
def test_the_model_card_says_how_tunables_were_moved(arguments, said, tiny_model, tmp_path):
    run = trainer(str(tiny_model("llama")), tmp_path / "out", logging_steps=1, **arguments)
    run.train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(part in card for part in said)
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert f"| lr | {rates[0]} |" in card and rates[1] == pytest.approx(rates[0] * 3 / 4)


def test_the_model_card_says_how_it_was_made(tiny_model, tmp_path):
    trainer(str(tiny_model("llama")), tmp_path / "out", seed=5).train()
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "- auto-round",
        "| iters | 3 |",
        "| seed | 5 |",
        "16 x 24 tokens",
        "21 x W4A16G32",
    ):
        assert part in card, part
    assert card.count("| model.layers.") == 3 + 7 and str(tmp_path) not in card
    assert card.count("| q_proj | 3 | 0.0") == 1 or card.count("| q_proj | 3 | 0.1") == 1


def test_save_model_copies_and_push_needs_a_name(tiny_model, tmp_path):
    run = trainer(str(tiny_model("llama")), tmp_path / "out")
    with pytest.raises(AutoRoundError, match="call train\\(\\) first"):
        run.save_model(tmp_path / "copy")
    run.train()
    run.save_model(tmp_path / "copy")
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    with pytest.raises(AutoRoundError, match="push_to_hub needs a repository"):
        run.push_to_hub()


def refused(error, match, model, folder, **arguments):
    with pytest.raises(error, match=match):
        trainer(str(model), folder, **arguments).train()


def test_mistakes_are_answered_before_any_work(tiny_model, tmp_path):
    model, out = tiny_model("llama"), tmp_path / "out"
    refused(UnknownName, "no format is called 'auto_rond'; did you mean auto_round", model, out, format="auto_rond")
    refused(UnknownName, "no scheme is called", model, out, scheme="W4")
    refused(UnsupportedScheme, "bits=1 is not supported", model, out, bits=1)
    refused(UnsupportedScheme, "BF16 leaves every layer as it is", model, out, scheme="BF16", group_size=None)
    refused(
        AutoRoundError, "layer_config is no dict in Python's words: {'q_proj'; write it as", model, out, layer_config="{'q_proj'"
    )
    refused(AutoRoundError, "max_shard_size='big' is no size", model, out, max_shard_size="big")
    refused(AutoRoundError, "this machine has no accelerator|there are", model, out, device_map=7)
    refused(AutoRoundError, "'gpu', which is no device", model, out, device_map="gpu")
    refused(MissingDependency, "report_to", model, out, report_to=["wandb"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"iters": -1}, "iters=-1: it has to be a whole number, 0 or more"),
        ({"lr": 0.0}, r"lr=0\.0: a rate has to be above 0"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"momentum": 0.9}, r"momentum=0\.9: it belongs to the sign step, .* add enable_adam=False"),
        ({"nblocks": 0}, "nblocks=0"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, match):
    with pytest.raises(AutoRoundError, match=match):
        RoundingArguments(**arguments)


def test_a_folder_of_somebody_elses_files_is_refused(tiny_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    refused(OutputError, r"is not empty \(thesis.tex\); give another --output_dir", tiny_model("llama"), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
    with pytest.raises(OutputError, match="is not empty"):  # before the data, which may have to be fetched
        RoundingTrainer(tiny_model("llama"), RoundingArguments(output_dir=str(tmp_path), dataset="nowhere.txt")).prepare()
    (tmp_path / "file").write_text("x")
    refused(OutputError, "is a file; give a folder", tiny_model("llama"), tmp_path / "file")
    done = tmp_path / "done"
    trainer(str(tiny_model("llama")), done).train()
    refused(OutputError, "is not empty", tiny_model("llama"), done)


def test_a_disk_too_small_is_found_before_the_work(tiny_model, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    refused(OutputError, r"needs 0\.\d GB and its disk has 0\.0 GB free; make room", tiny_model("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "asks"),
    [({"iters": 0}, True), ({"iters": 2}, False), ({"iters": 0, "disable_opt_rtn": True}, False)],
    ids=["opt_rtn", "tuned", "rtn"],
)
def test_inputs_are_kept_only_for_who_reads_them_and_no_more_in_small_batches(arguments, asks, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_autoround.trainer.run.SAMPLED_ROWS", 64)
    kept, inputs = [], InputStatistics.inputs

    def counted(statistics, name):
        kept.append(sum(map(len, inputs(statistics, name))))
        return inputs(statistics, name)

    monkeypatch.setattr(InputStatistics, "inputs", counted)
    for name, batch_size in (("eight", 8), ("one", 1)):
        args = RoundingArguments(
            output_dir=str(tmp_path / name), scheme="NVFP4", batch_size=batch_size, disable_tqdm=True, **arguments
        )
        RoundingTrainer(str(tiny_model("llama")), args, train_dataset=tokens(32)).train()
    assert kept and max(kept) <= 64 and (min(kept) >= 32 if asks else max(kept) == 0)


def test_the_disk_has_to_hold_what_tuning_keeps_besides(tiny_model, tmp_path):
    kept = []
    for name, arguments in enumerate((
        {"iters": 0, "disable_opt_rtn": True}, {"iters": 2}, {"iters": 0, "end_to_end_steps": 2},
        {"iters": 2, "end_to_end_steps": 2}, {"iters": 2, "end_to_end_steps": 2, "low_gpu_mem_usage": True},
    )):  # fmt: skip
        args = RoundingArguments(output_dir=str(tmp_path / str(name)), scheme="W4A16G32", self_samples=0, **arguments)
        kept.append(RoundingTrainer(str(tiny_model("llama")), args, train_dataset=tokens(32)).prepare().kept_per_weight)
    assert kept[0] == 0 and kept == sorted(set(kept))


@pytest.mark.parametrize("scheme", ["W2A16G32", "W4A16", "MXFP4"])
@pytest.mark.parametrize(
    "arguments", [{"iters": 2}, {"iters": 2, "end_to_end_steps": 4, "save_steps": 2}], ids=["blocks", "whole"]
)
def test_the_journal_keeps_no_more_than_the_disk_was_asked_for(scheme, arguments, tiny_model, tmp_path):
    most = []

    def kept():  # without the names in the files, and what is no quantized weight: small in models that are not tiny
        files = list((tmp_path / "out" / ".autoround-journal").rglob("*.safetensors"))
        tensors = {(file, key): tensor for file in files for key, tensor in load_file(file).items()}
        return sum(tensor.nbytes for (_, key), tensor in tensors.items() if "norm" not in key)

    class Watch(TrainerCallback):
        def on_log(self, *args, **kwargs):
            most.append(kept())

        on_save = on_epoch_end = on_log

    args = RoundingArguments(
        output_dir=str(tmp_path / "out"), scheme=scheme, self_samples=0, residence="resident", disable_tqdm=True, **arguments
    )
    trainer = RoundingTrainer(str(tiny_model("llama_wide")), args, train_dataset=tokens(32), callbacks=[Watch()])
    run = trainer.prepare()
    asked = run.kept_per_weight * sum(site.shape[0] * site.shape[1] for site in run.plan.sites)
    trainer.train()
    assert asked / 4 < max(most) <= asked


def test_a_disk_that_fills_up_leaves_no_checkpoint_and_keeps_the_journal(tiny_model, tmp_path, monkeypatch):
    import errno
    import os

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, out = tiny_model("llama"), tmp_path / "out"
    with monkeypatch.context() as patched:
        calls = []
        original = os.pwrite
        patched.setattr(os, "pwrite", lambda *a: full() if len(calls) > 9 else (calls.append(1), original(*a))[1])
        refused(OutputError, "No space left on device; make room on that disk", model, out)
    assert [path.name for path in out.iterdir()] == [".autoround-journal"]
    trainer(str(model), out).train(resume_from_checkpoint=True)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("arguments", [{}, {"iters": 0, "disable_opt_rtn": True}], ids=["tuned", "rtn"])
def test_nan_in_weights_names_the_layer(arguments, tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    refused(CheckpointError, r"model\.layers\.1\.mlp\.up_proj.* holds NaN", tmp_path / "model", tmp_path / "out", **arguments)
    assert not list(Path(tmp_path / "out").rglob("config.json"))


@pytest.mark.parametrize("iters", [2, 0])
def test_overflowing_activations_name_the_block(iters, tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, file, {"format": "pt"})
    refused(
        AutoRoundError, r"outputs of model\.layers\.1 hold NaN or infinity", tmp_path / "model", tmp_path / "out", iters=iters
    )


def test_a_folder_without_tokenizer_needs_token_ids(tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(
        AutoRoundError,
        "need a tokenizer and the model folder has none",
        tmp_path / "model",
        tmp_path / "a",
        train_dataset=["x"] * 9,
    )
    trainer(str(tmp_path / "model"), tmp_path / "b").train()


def test_experts_of_one_layer_may_stay_float(tiny_model, tmp_path):
    trainer(str(tiny_model("qwen3_moe")), tmp_path / "out", ignore_layers=[r"layers\.1\..*experts"]).train()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    exact = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3_moe"))
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, exact.model.layers[1].mlp.experts.down_proj)


def test_a_block_may_stay_float_as_a_whole(tiny_model, tmp_path):
    model = tiny_model("llama")
    trainer(str(model), tmp_path / "out", ignore_layers=["layers.0."]).train()
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("model.layers.0."))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_key_that_means_more_than_the_head_is_not_dropped(tiny_model, tmp_path):
    trainer(str(tiny_model("llama")), tmp_path / "out", ignore_layers=["lm_head|o_proj", "lm_head"]).train()
    assert "model.layers.0.self_attn.o_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")
    tied = tiny_model("llama_tied")
    trainer(str(tied), tmp_path / "tied", layer_config={"lm_head": {"bits": 16}}, iters=0, disable_opt_rtn=True).train()


def test_nobody_elses_hidden_files_are_touched(tiny_model, tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "thesis.txt").write_text("x")
    refused(OutputError, "is not empty", tiny_model("llama"), tmp_path)
    assert (tmp_path / ".partial" / "thesis.txt").exists()


def test_a_finished_run_is_left_alone_and_another_one_refused(tiny_model, tmp_path):
    model = str(tiny_model("llama"))
    trainer(model, tmp_path / "out").train()
    (tmp_path / "out" / ".autoround-journal.done").mkdir()  # as a kill at the very end leaves it
    assert trainer(model, tmp_path / "out").train(resume_from_checkpoint=True).global_step == 9
    assert not (tmp_path / "out" / ".autoround-journal.done").exists()
    with pytest.raises(AutoRoundError, match="seed was 42 and is 9"):
        trainer(model, tmp_path / "out", seed=9).train(resume_from_checkpoint=True)


def test_a_change_of_one_weight_is_another_model(tiny_model, tmp_path):
    import shutil

    from hf_autoround.models.loading import open_model

    model = tiny_model("llama")
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][7, 7] += 1e-3
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    one, other = (open_model(folder).checkpoint.fingerprint() for folder in (model, tmp_path / "model"))
    assert one != other
    live = AutoModelForCausalLM.from_pretrained(model)
    before = open_model(live).checkpoint.fingerprint()
    live.model.norm.weight.data[0] += 1
    assert open_model(live).checkpoint.fingerprint() != before


def test_norms_ship_as_they_were_tuned_in_any_precision(tiny_model, tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    trainer(str(model), tmp_path / "out", disable_amp=True, iters=12, scheme="W2A16G32").train()
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_a_model_in_memory_is_written_like_its_folder(name, tiny_model, tmp_path):
    folder = tiny_model(name, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for source, out in ((str(folder), "folder"), (model, "memory")):
        trainer(source, tmp_path / out).train()
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("folder", "memory"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((tmp_path / "memory" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "memory" / "tokenizer.json").exists()


def test_a_missing_tensor_and_a_damaged_embedding_are_named(tiny_model, tmp_path):
    import shutil

    embedding = "model.embed_tokens.weight"
    damages = [
        (lambda tensors: tensors.pop(embedding), f"holds no tensor for {embedding}", {}),
        (lambda tensors: tensors[embedding].fill_(float("inf")), f"{embedding} holds NaN", {"iters": 0, "disable_opt_rtn": True}),
    ]
    for place, (damage, match, arguments) in enumerate(damages):
        model = tmp_path / f"model-{place}"
        shutil.copytree(tiny_model("llama"), model)
        tensors = load_file(model / "model.safetensors")
        damage(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        refused(CheckpointError, match, model, tmp_path / f"out-{place}", **arguments)


def test_a_conv1d_model_dequantizes_to_what_it_was(tiny_model, tmp_path):
    trainer(str(tiny_model("gpt2")), tmp_path / "out").train()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits = packed(tokens(2, 10)).logits
    packed.dequantize().save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(tokens(2, 10)).logits, logits)
