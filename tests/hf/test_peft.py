# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed layers: it learns, merges exactly, rounds onto the grid, and what is saved is what was there."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from tiny import tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

import hf_autoround
from hf_autoround import AutoRound, AutoRoundError, merge_onto_grid, prepare_model_for_lora
from hf_autoround.layers.packed_linear import PackedLinear

peft = pytest.importorskip("peft")
TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc1"]}
IDS = tokens(2)


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory):
    """A function: architecture (and dtype, scheme) -> a freshly loaded quantized model."""
    made: dict = {}

    def load(name="llama", dtype=torch.float32, scheme="W4A16G32"):
        if (name, scheme) not in made:
            made[name, scheme] = tmp_path_factory.mktemp("quantized")
            AutoRound(str(tiny_model(name)), scheme=scheme, recipe="rtn", disable_tqdm=True).quantize_and_save(made[name, scheme])
        return AutoModelForCausalLM.from_pretrained(made[name, scheme], dtype=dtype).eval()

    return load


def adapted(model, targets=TARGETS["llama"], seed=0, name="default", **config):
    """Return a PeftModel whose adapter does something."""
    adapter = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", r=4, **config)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, adapter)
    else:
        model = peft.get_peft_model(model, adapter, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f".{name}." in path:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def packed_tensors(model):
    """Return every packed tensor by name: layer and, after the last dot, what it is called in there."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    tensors = {f"{name}.{leaf}": tensor.clone() for name, layer in layers for leaf, tensor in layer.packed().items()}
    assert tensors
    return tensors


@pytest.mark.parametrize("name", TARGETS)
def test_merging_is_exact_and_unmerging_gives_the_packed_layer_back(name, quantized):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unsupported layer type")
        model = adapted(quantized(name), TARGETS[name], fan_in_fan_out=name == "gpt2")
    plain, before = logits(quantized(name)), logits(model)
    assert (before - plain).abs().max() > 0.02
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(logits(model), before)  # another path: one product instead of three
    torch.testing.assert_close(logits(model), before, rtol=0, atol=5e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", TARGETS)
def test_merged_layers_are_named_in_the_config_and_load_again(name, quantized, tmp_path):
    model = adapted(quantized(name), TARGETS[name])
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=5e-6)
    named = {n for n, scheme in merged.config.quantization_config.extra_config.items() if scheme["bits"] == 16} - {"lm_head"}
    assert named and all(n.endswith(tuple(TARGETS[name])) for n in named)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    assert any(isinstance(module, PackedLinear) for module in again.modules())


def test_merged_layers_in_a_model_with_quantized_inputs_say_that_theirs_are_not(quantized, tmp_path):
    merged = adapted(quantized(scheme="INT8")).merge_and_unload()
    merged.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    named = {name: entry for name, entry in stored["extra_config"].items() if name.endswith(tuple(TARGETS["llama"]))}
    assert named and all(entry["act_bits"] == 16 for entry in named.values())  # auto-round would take the others' inputs
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.parametrize("scheme", ["W4A16G32", "W3A16G32", {"bits": 4, "sym": False, "group_size": 32}], ids=str)
def test_merging_onto_the_grid_keeps_the_scheme_and_what_the_grid_can_hold(scheme, quantized, tmp_path):
    scheme = scheme if isinstance(scheme, str) else hf_autoround.scheme.resolve_scheme(scheme)
    model = adapted(quantized(scheme=scheme))
    base = quantized(scheme=scheme)
    plain, expected, config, before = logits(base), logits(model), base.config.quantization_config.to_dict(), packed_tensors(base)
    merged = merge_onto_grid(model)
    assert merged.config.quantization_config.to_dict() == config
    after = packed_tensors(merged)
    layers = {name.rpartition(".")[0] for name in before}
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in layers if name.endswith(tuple(TARGETS["llama"]))}
    assert (logits(merged) - expected).norm() < 0.5 * (plain - expected).norm()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_an_adapter_far_smaller_than_the_grids_steps_outlives_the_rounding(quantized):
    model = adapted(quantized())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)
    plain, expected = logits(quantized()), logits(model)
    merged = merge_onto_grid(model)
    reads = tokens(2)  # the same inputs: what the adapter adds to them is what has to survive
    with torch.no_grad():
        added, kept = expected - plain, merged(reads).logits - plain
    assert (added * kept).sum() > 0.5 * added.square().sum()


def test_an_adapter_that_does_nothing_changes_no_bit(quantized):
    before = packed_tensors(quantized())
    merged = merge_onto_grid(peft.get_peft_model(quantized(), peft.LoraConfig(target_modules=TARGETS["llama"])))
    after = packed_tensors(merged)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_change_that_the_grid_cannot_hold_is_said(quantized, caplog):
    model = adapted(quantized(scheme="W2A16G32"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-4)
    logging.enable_propagation()
    try:
        merge_onto_grid(model)
    finally:
        logging.disable_propagation()
    assert "6 layers merged onto their grids, which hold" in caplog.text


def test_an_adapter_loads_in_a_new_process_whichever_package_comes_first(quantized, tmp_path):
    base = quantized()
    base.save_pretrained(tmp_path / "model")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits")
    code = """
import torch; from transformers import AutoModelForCausalLM
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/model"), f"{folder}/adapter")
with torch.no_grad():
    print(torch.equal(model(torch.load(f"{folder}/ids")).logits, torch.load(f"{folder}/logits")))
"""
    torch.save(IDS, tmp_path / "ids")
    looked = "import importlib.util; importlib.util.find_spec('peft')"  # as transformers does to see what is installed
    for first in ("import hf_autoround, peft", "import peft, hf_autoround", f"import hf_autoround; {looked}; import peft"):
        command = f"{first}; folder = {str(tmp_path)!r}; torch = __import__('torch'); torch.set_num_threads(1){code}"
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "True", done.stderr


def test_a_transformers_model_takes_an_adapter_itself(quantized, tmp_path):
    model = quantized()
    try:
        model.add_adapter(peft.LoraConfig(target_modules=TARGETS["llama"], r=4, init_lora_weights=False))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    assert (logits(model) - logits(quantized())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = quantized()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(quantized()))


def test_several_adapters_add_up_and_come_apart(quantized):
    one, two = adapted(quantized(), seed=1, name="one"), adapted(quantized(), seed=2, name="two", use_rslora=True)
    both = adapted(adapted(quantized(), seed=1, name="one"), seed=2, name="two", use_rslora=True)
    for name, alone in (("one", one), ("two", two), ("one", one)):
        both.set_adapter(name)
        torch.testing.assert_close(logits(both), logits(alone), rtol=0, atol=1e-6)
    both.base_model.set_adapter(["one", "two"])
    together = logits(both)
    assert (together - logits(one)).abs().max() > 0.05 and (together - logits(two)).abs().max() > 0.05
    both.merge_adapter(["one"])
    both.merge_adapter(["two"])
    torch.testing.assert_close(logits(both), together, rtol=0, atol=5e-6)
    both.unmerge_adapter()
    assert torch.equal(logits(both), together)
    rows = both(IDS, adapter_names=["one", "__base__"]).logits
    torch.testing.assert_close(rows[:1], logits(one)[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[1:], logits(quantized())[1:], rtol=0, atol=1e-5)


def test_biases_of_adapters_merge_where_there_is_a_bias_to_take_them(quantized):
    model = adapted(quantized("opt"), TARGETS["opt"], lora_bias=True)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=5e-6)
    without = adapted(quantized(), lora_bias=True)
    with pytest.raises(AutoRoundError, match="has no bias to take it"):
        without.merge_adapter()


def test_a_broken_adapter_is_refused_before_anything_changes(quantized):
    model = adapted(quantized())
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    before = packed_tensors(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_onto_grid(model)
    after = packed_tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_all_linear_means_packed_layers_too_but_not_the_head_or_experts(quantized):
    model = adapted(quantized(), "all-linear")
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ == "AutoRoundLoraLinear"}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    experts = adapted(quantized("gpt_oss"), "all-linear")
    names = {name for name, _ in experts.named_modules() if "lora" in name}
    assert names and not [name for name in names if "experts" in name]


def test_experts_named_as_targets_stay_as_they_are(quantized):
    model = adapted(quantized("gpt_oss"), ["q_proj", "down_proj"])
    assert not [name for name, _ in model.named_modules() if "experts" in name and "lora" in name]
    assert (logits(model) - logits(quantized("gpt_oss"))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"use_dora": True}, "cannot have use_dora"),
        ({"init_lora_weights": "pissa"}, "cannot have init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "plain LoRA"),
    ],
    ids=str,
)
def test_what_needs_float_weights_is_refused(config, part, quantized):
    with pytest.raises(AutoRoundError, match=part):
        adapted(quantized(), **config)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_lowers_the_loss_and_leaves_packed_tensors_alone(checkpointing, quantized, tmp_path):
    model = prepare_model_for_lora(quantized(dtype=torch.bfloat16), use_gradient_checkpointing=checkpointing)
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {torch.float32}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8, lora_alpha=32))
    before = packed_tensors(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.8 * float(losses[0])
    after = packed_tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" not in name} == {False}


def test_a_bfloat16_model_keeps_its_dtype_through_a_merge(quantized, tmp_path):
    merged = adapted(quantized(dtype=torch.bfloat16)).merge_and_unload()
    assert merged.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_a_bfloat16_model_multiplies_in_it_while_it_trains_and_comes_back_in_it(quantized, tmp_path, monkeypatch):
    dtypes = {name: tensor.dtype for name, tensor in quantized(dtype=torch.bfloat16).named_buffers()}
    model = adapted(prepare_model_for_lora(quantized(dtype=torch.bfloat16)))
    layers, seen = [module for module in model.modules() if isinstance(module, PackedLinear)], set()
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    for layer in layers:
        kernel = layer.kernel
        layer.kernel = lambda own, inputs, kernel=kernel: seen.add(inputs.dtype) or kernel(own, inputs)
    before = logits(model)
    assert before.dtype == torch.float32 and seen == {torch.bfloat16}
    model.merge_adapter()
    assert logits(model).dtype == torch.float32
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0.05)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters() if parameter.ndim == 1} == {torch.bfloat16}
    assert merged.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in merged.named_buffers()}.items() <= dtypes.items()
    assert torch.float32 in dtypes.values()  # rotary tables, whichever dtype the model is in
    torch.testing.assert_close(logits(merged).float(), before, rtol=0, atol=0.1)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.parametrize("scheme", ["W4A16G32", "W8A16G32", "W3A16G32"])
def test_a_layer_in_a_kernels_own_order_learns_and_takes_a_merge(scheme, quantized, tmp_path):
    model = adapted(prepare_model_for_lora(quantized(dtype=torch.bfloat16, scheme=scheme), dtype=None))
    model.train()
    before = logits(quantized(dtype=torch.bfloat16, scheme=scheme)).float()
    model(IDS, labels=IDS).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name and parameter.requires_grad]
    assert gradients and all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)
    expected = logits(model.eval()).float()
    merged = merge_onto_grid(model)
    assert (logits(merged).float() - expected).norm() < 0.6 * (before - expected).norm()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_what_is_not_ours_is_refused_in_a_sentence(tiny_model, quantized):
    float_model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with pytest.raises(AutoRoundError, match="no packed layer"):
        prepare_model_for_lora(float_model)
    with pytest.raises(AutoRoundError, match="this LlamaModel is a part of one"):
        prepare_model_for_lora(quantized().model)
    with pytest.raises(AutoRoundError, match="not a LlamaForCausalLM"):
        merge_onto_grid(float_model)
    with pytest.raises(AutoRoundError, match="no adapter on a packed layer"):
        merge_onto_grid(adapted(float_model))
