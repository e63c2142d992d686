# SPDX-License-Identifier: Apache-2.0
"""Laws of tuning end to end: it ships what it measured, memory and processes change no bit, nothing is lost."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_streams import contents
from tiny import CONFIGS, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_autoround import AutoRound, RoundingArguments, RoundingTrainer
from hf_autoround.errors import AutoRoundError, CalibrationError, ResumeError, UnknownName
from hf_autoround.models.blocks import model_parts
from hf_autoround.models.head import Head
from hf_autoround.streams.end_to_end_journal import EndToEndJournal
from hf_autoround.streams.journal import Journal
from hf_autoround.trainer import trainer as trainer_module
from hf_autoround.tuning import teacher
from hf_autoround.tuning.end_to_end import Progress
from hf_autoround.tuning.samples import split

SAMPLES = tokens(40)
# they begin with plain round to nearest: what opt_rtn makes of so small a model is too good for a few steps, and would stay
BLOCKS_ONLY = {
    "disable_opt_rtn": True,
    "scheme": "W2A16G32",
    "batch_size": 4,
    "iters": 0,
    "disable_tqdm": True,
    "disable_amp": True,
}
QUICK = BLOCKS_ONLY | {"end_to_end_steps": 6, "end_to_end_lr": 0.03}


def tuned(model, folder, callbacks=(), resume=False, **arguments):
    args = RoundingArguments(output_dir=str(folder), **{**QUICK, **arguments})
    trainer = RoundingTrainer(str(model), args, train_dataset=SAMPLES, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def divergence(float_model, model, rows):
    with torch.no_grad():
        p, q = (F.log_softmax(each(rows, use_cache=False).logits.float(), -1) for each in (float_model, model))
    return (p.exp() * (p - q)).sum().item() / rows.numel()


def measured(trainer):
    return [entry for entry in trainer.state.log_history if "held_out_kl" in entry]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_ships_is_as_far_from_the_float_model_as_was_measured(name, tiny_model, tmp_path):
    model = tiny_model(name)
    trainer = tuned(model, tmp_path / "out", end_to_end_steps=24, end_to_end_lr=0.01)
    first, last = measured(trainer)[0], measured(trainer)[-1]
    best = next(entry for entry in measured(trainer) if entry["end_to_end_step"] == last["best_step"])
    assert best["held_out_kl"] < first["held_out_kl"]
    _, held_out = split(len(SAMPLES), 16)
    float_model, loaded = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "out"))
    found = divergence(float_model.float(), loaded.dequantize().float(), SAMPLES[held_out])
    assert found == pytest.approx(best["held_out_kl"], rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_blocks_error_is_the_divergence_of_the_predictions(name, tiny_model, tmp_path):
    model = tiny_model(name)
    trainer = tuned(model, tmp_path / "out", iters=12, lr=0.02, end_to_end_steps=0)
    last = [entry for entry in trainer.state.log_history if "loss_best" in entry][-1]
    assert last["loss_best"] < last["loss_first"]
    _, held_out = split(len(SAMPLES), 16)
    float_model, loaded = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "out"))
    found = divergence(float_model.float(), loaded.dequantize().float(), SAMPLES[held_out])
    assert found == pytest.approx(last["loss_best"], rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_end_of_a_model_gives_its_own_logits(name, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), attn_implementation="eager").float().eval()
    blocks = [model.get_submodule(block) for block in model_parts(model).block_names]
    returned = []
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: returned.append(output))
    with torch.no_grad():
        logits = model(SAMPLES[:3], use_cache=False).logits
        hook.remove()
        hidden = returned[0][0] if isinstance(returned[0], tuple) else returned[0]
        returns_tuple = isinstance(returned[0], tuple)
        heads = [weight for weight in model.named_parameters(remove_duplicate=False) if "lm_head" in weight[0]]
        for autocast in (None, torch.bfloat16):
            weights = {key: tensor.to(autocast or torch.float32) for key, tensor in heads}
            head = Head(model, blocks, torch.device("cpu"), autocast, returns_tuple, weights)
            finished = head.finished(hidden, SAMPLES[:3])
            assert torch.allclose(head.logits(finished[1]).float(), logits[1], atol=1e-5 if autocast is None else 0.02)
            assert head.linear == (name != "gemma2")  # whose logits have a soft cap


def test_a_head_with_a_bias_is_not_linear(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), 0.1))
    assert not Head(model, list(model.model.layers), torch.device("cpu"), weights={"lm_head.weight": model.lm_head.weight}).linear


def test_it_begins_where_the_blocks_ended_rounding_included(tiny_model, tmp_path):
    model = tiny_model("llama")
    trainer = tuned(model, tmp_path / "out", iters=8)
    tuned(model, tmp_path / "blocks", iters=8, end_to_end_steps=0)
    _, held_out = split(len(SAMPLES), 16)
    float_model, loaded = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "blocks"))
    found = divergence(float_model, loaded.dequantize(), SAMPLES[held_out])
    assert found == pytest.approx(measured(trainer)[0]["held_out_kl"], rel=1e-4)


@pytest.mark.parametrize(("start", "name"), [("rtn", "llama"), *(("opt_rtn", name) for name in CONFIGS)])
def test_the_start_is_a_candidate(start, name, tiny_model, tmp_path):
    begins = {"disable_opt_rtn": start == "rtn"}
    trainer = tuned(tiny_model(name), tmp_path / "out", end_to_end_lr=30.0, enable_minmax_tuning=False, **begins)
    assert measured(trainer)[-1]["best_step"] == 0
    AutoRound(str(tiny_model(name)), dataset=SAMPLES, **BLOCKS_ONLY | begins).quantize_and_save(tmp_path / "blocks")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "blocks"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sym": False},
        {"quant_lm_head": True},
        {"nblocks": 2},
        {"gradient_accumulate_steps": 2},
        {"scheme": "W8A16"},
        {"bits": 3, "group_size": -1},
        {"format": "auto_round,fake", "scheme": "W4A16G32"},
        {"layer_config": {"down_proj": {"bits": 8}}},
        {"enable_norm_bias_tuning": False, "enable_minmax_tuning": False},
        {"disable_opt_rtn": True},
    ],
    ids=lambda arguments: ",".join(f"{name}={value}" for name, value in arguments.items() if name != "scheme") or "W8A16",
)
def test_whatever_block_tuning_serves_it_serves(arguments, tiny_model, tmp_path):
    trainer = tuned(tiny_model("qwen3"), tmp_path / "out", **arguments)
    assert [entry["end_to_end_step"] for entry in measured(trainer)] == [0, 6]
    for folder in (tmp_path / "out", *(tmp_path / "out").glob("*/")):
        if (folder / "config.json").exists():
            AutoModelForCausalLM.from_pretrained(folder)(SAMPLES[:1])


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_resident_and_streamed_give_the_same_bytes(name, tiny_model, tmp_path):
    for residence in ("resident", "streamed"):
        tuned(tiny_model(name), tmp_path / residence, residence=residence)
    assert contents(tmp_path / "resident") == contents(tmp_path / "streamed")


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("room", [0, 1 << 60], ids=["files", "memory"])  # for page-locked memory, which a GPU alone has
@pytest.mark.parametrize("arguments", [{}, {"quant_lm_head": True}, {"nblocks": 3}], ids=["blocks", "head", "one"])
def test_blocks_that_travel_to_the_device_and_back_give_the_same_bytes(arguments, room, tiny_model, tmp_path, monkeypatch):
    if room and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    model, settings = tiny_model("llama"), {"save_steps": 2, **arguments}
    tuned(model, tmp_path / "stay", residence="resident", **settings)
    monkeypatch.setattr("hf_autoround.streams.end_to_end._Stage.travels", property(lambda self: True))
    monkeypatch.setattr("hf_autoround.streams.end_to_end._free_memory", lambda device: room)
    settings["residence"] = "streamed"
    tuned(model, tmp_path / "travel", **settings)
    with pytest.raises(AutoRoundError, match="stopped by a callback"):
        tuned(model, tmp_path / "torn", [StopAt(3 + 3)], **settings)
    tuned(model, tmp_path / "torn", resume=True, **settings)
    assert contents(tmp_path / "stay") == contents(tmp_path / "travel") == contents(tmp_path / "torn")


def test_stopped_anywhere_and_resumed_equals_undisturbed(tiny_model, tmp_path):
    model, settings = tiny_model("llama"), {"save_steps": 2}
    tuned(model, tmp_path / "whole", **settings)
    for steps in (1, 3, 5):  # of the end to end stage, after three of the blocks
        with pytest.raises(AutoRoundError, match=f"stopped by a callback after step {steps} of end to end tuning.*resume"):
            tuned(model, tmp_path / "torn", [StopAt(3 + steps)], resume=steps > 1, **settings)
    journal = tmp_path / "torn" / ".autoround-journal" / "end_to_end"
    assert [path.name for path in journal.glob("checkpoint-*")] == ["checkpoint-000005"]
    trainer = tuned(model, tmp_path / "torn", resume=True, **settings)
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")
    assert [entry["end_to_end_step"] for entry in measured(trainer)] == [0, 6]


def test_an_epoch_stop_keeps_the_best_so_far(tiny_model, tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step >= 3 + 4

    trainer = tuned(tiny_model("llama"), tmp_path / "out", [Enough])
    assert [entry["end_to_end_step"] for entry in measured(trainer)] == [0, 4]


def test_there_is_no_checkpoint_after_the_last_step(tiny_model, tmp_path):
    class Count(TrainerCallback):
        saved = 0

        def on_save(self, args, state, control, **kwargs):
            self.saved += state.epoch > 3

    count = Count()
    tuned(tiny_model("llama"), tmp_path / "out", [count], save_steps=4)
    assert count.saved == 1


def test_the_best_result_that_a_checkpoint_knows_of_stays(tmp_path):
    record = EndToEndJournal(Journal(tmp_path, {}))
    record.put_best(25, [])
    record.save(Progress(50, 0.5, 25), [], [])
    record.put_best(75, [])
    assert record.best(25).folder.exists() and record.best(75).folder.exists()
    record.save(Progress(100, 0.4, 75), [], [])
    assert not record.best(25).folder.exists()
    record.put_best(125, [])
    record.finish(Progress(150, 0.3, 125), [])
    assert record.best(125).folder.exists() and not record.best(75).folder.exists()


def test_blocks_are_decided_on_all_data_and_on_no_sampled_text(tiny_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_autoround.trainer.trainer.stream_blocks",
        lambda model, *rest, original=trainer_module.stream_blocks: (seen.append(model.tokens), original(model, *rest)),
    )
    data = {"dataset": "pydoc:num=12", "seqlen": 16, "nsamples": 8, "self_samples": 16}
    RoundingTrainer(str(tiny_model("llama")), RoundingArguments(output_dir=str(tmp_path / "out"), **data, **QUICK)).train()
    assert seen[0].shape == (12, 16)


@pytest.mark.parametrize(
    ("name", "arguments", "fewer"),
    [
        ("llama", {"iters": 0}, True),
        ("llama", {"iters": 0, "end_to_end_steps": 0}, False),
        ("llama", {"iters": 0, "disable_opt_rtn": True}, True),
        ("llama", {"iters": 2}, False),
        ("llama", {"iters": 0, "scheme": "FP8_STATIC"}, False),
        ("llama", {"iters": 0, "batch_size": 30}, False),
        ("qwen3_moe", {"iters": 0}, False),
    ],
    ids=["a start", "all there is", "round to nearest", "tuned", "ranges of inputs", "fewer would be no batch", "experts"],
)
def test_rounding_that_is_only_a_start_sees_fewer_samples(name, arguments, fewer, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_autoround.trainer.run.SAMPLED_ROWS", 24)  # times eight: eight samples of 24 tokens
    settings = {"scheme": "W4A16", "batch_size": 4, "end_to_end_steps": 2, "disable_tqdm": True, **arguments}
    args = RoundingArguments(output_dir=str(tmp_path / "out"), **settings)
    run = RoundingTrainer(str(tiny_model(name)), args, train_dataset=SAMPLES).prepare()
    assert torch.equal(run.for_blocks(SAMPLES), SAMPLES[2::5] if fewer else SAMPLES)


def test_blocks_follow_the_evened_gradient_of_every_position(tiny_model, tmp_path, monkeypatch):
    lengths = []

    def twice(gradient, original=teacher.evened):
        lengths.append(len(gradient))
        return 2 * original(gradient)

    trainer = tuned(tiny_model("llama"), tmp_path / "evened")
    monkeypatch.setattr(teacher, "evened", lambda gradient: gradient)
    as_they_are = tuned(tiny_model("llama"), tmp_path / "as-they-are")
    assert measured(trainer)[0]["held_out_kl"] == measured(as_they_are)[0]["held_out_kl"]
    assert measured(trainer)[-1]["held_out_kl"] != measured(as_they_are)[-1]["held_out_kl"]
    monkeypatch.undo()
    monkeypatch.setattr(teacher, "evened", twice)
    tuned(tiny_model("llama"), tmp_path / "twice")
    assert lengths == [4 * 24] * 6
    assert contents(tmp_path / "twice") == contents(tmp_path / "evened"), "Adam does not mind the size of gradients"


def test_a_start_that_is_no_number_is_an_error(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_autoround.tuning.end_to_end._held_out", lambda *given: float("nan"))
    with pytest.raises(CalibrationError, match=r"predictions of the quantized model .* hold NaN or infinity"):
        tuned(tiny_model("llama"), tmp_path / "out")


def test_other_steps_are_refused_when_resuming(tiny_model, tmp_path):
    with pytest.raises(AutoRoundError, match="stopped by a callback"):
        tuned(tiny_model("llama"), tmp_path / "torn", [StopAt(4)])
    with pytest.raises(ResumeError, match="end_to_end_steps was 6 and is 7"):
        tuned(tiny_model("llama"), tmp_path / "torn", resume=True, end_to_end_steps=7)


def test_the_same_seed_gives_the_same_bytes_and_the_callers_random_state_stays(tiny_model, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for name, seed in (("one", 1), ("two", 1), ("three", 3)):
        tuned(tiny_model("llama"), tmp_path / name, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    one, three = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "three"))
    assert any(not torch.equal(one[key], three[key]) for key in one)


def test_log_card_and_plot_tell_how_it_went(tiny_model, tmp_path):
    trainer = tuned(tiny_model("llama"), tmp_path / "out", logging_steps=2)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["max_steps"] == 3 + 6 and state["global_step"] == 9 and state["num_train_epochs"] == 4
    assert [entry["step"] for entry in state["log_history"] if "learning_rate" in entry] == [5, 7, 9]
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| end_to_end_steps | 6 |" in card
        and f"| batch_size | {trainer.args.batch_size} |" in card
        and f"{measured(trainer)[0]['held_out_kl']:.4f} before" in card
    )
    pytest.importorskip("matplotlib")
    assert "![KL divergence over steps](end_to_end.png)" in card
    assert (tmp_path / "out" / "end_to_end.png").read_bytes()[:4] == b"\x89PNG"


def test_a_residence_that_does_not_exist_is_refused():
    with pytest.raises(UnknownName, match="residence='streaming': it is auto, resident, streamed"):
        replace(RoundingArguments(), residence="streaming")
