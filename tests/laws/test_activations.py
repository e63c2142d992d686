# SPDX-License-Identifier: Apache-2.0
"""Laws of quantized inputs: what is tuned is what runs, in every algorithm, for every preset that quantizes inputs."""

import json

import pytest
import torch
from inputs import logits_on_quantized_inputs
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound
from hf_autoround.layers.activations import InputQuantizer
from hf_autoround.numerics import data_type
from hf_autoround.scheme import PRESETS, resolve_scheme

CUSTOM = [
    {"scheme": "W4A16G32", "act_bits": 8, "act_group_size": -1},
    {"scheme": "W8A16G32", "act_bits": 8, "act_sym": False},
    {"scheme": "W4A16G32", "act_bits": 8, "act_group_size": 0, "act_dynamic": False},
]
ALGORITHMS = {"opt_rtn": {"iters": 0}, "tuned": {"iters": 3}, "end to end": {"iters": 0, "end_to_end_steps": 3}}
SCHEMES = [preset for preset in PRESETS if preset.activation is not None] + [resolve_scheme(each) for each in CUSTOM]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")


def quantized(model, scheme, folder, **arguments):
    defaults = {"recipe": "rtn", "dataset": tokens(), "disable_tqdm": True}
    AutoRound(str(model), scheme=scheme, **{**defaults, **arguments}).quantize_and_save(folder, "auto_round,fake")
    return load(folder / "auto_round"), load(folder / "fake")


@each_scheme
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_a_packed_model_multiplies_with_what_was_tuned(name, scheme, tiny_model, tmp_path):
    packed, fake = quantized(tiny_model(name), scheme, tmp_path)
    rows = tokens()[:2]
    with torch.no_grad():
        logits, plain = packed(rows).logits, fake(rows).logits
    expected = logits_on_quantized_inputs(fake, packed, rows)
    assert torch.equal(logits, expected) and not torch.equal(plain, expected)


@each_scheme
def test_gradients_pass_through_quantized_inputs(scheme):
    spec = scheme.activation
    static = None
    inputs = torch.randn(2, 3, 64, requires_grad=True)
    if data_type(spec).calibrates_inputs(spec):
        static = data_type(spec).input_scale(inputs.detach().abs().max(), spec).reshape(1)
    outputs = InputQuantizer(spec, static)(inputs)
    outputs.sum().backward()
    error = (outputs - inputs).norm() / inputs.norm()
    assert torch.equal(inputs.grad, torch.ones_like(inputs)) and 0 < error < {4: 0.2, 8: 0.05}[spec.bits]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@each_scheme
def test_every_algorithm_takes_it(scheme, algorithm, tiny_model, tmp_path):
    packed, _ = quantized(
        tiny_model("llama"), scheme, tmp_path, recipe="default", seqlen=24, nsamples=16, **ALGORITHMS[algorithm]
    )
    logits = packed(tokens()[:2]).logits
    exact = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)(tokens()[:2]).logits
    assert 0 < (logits - exact).norm() / exact.norm() < {4: 0.6, 8: 0.3}[scheme.weight.bits]


def test_the_config_says_how_inputs_are_quantized(tiny_model, tmp_path):
    layers = {"k_proj": {"bits": 8, "act_bits": 16}, "v_proj": {"bits": 16}}
    rounding = AutoRound(str(tiny_model("llama")), scheme="INT8", recipe="rtn", layer_config=layers, disable_tqdm=True)
    rounding.quantize_and_save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    inputs = {"act_bits": 8, "act_group_size": -1, "act_sym": True, "act_data_type": "int", "act_dynamic": True}
    assert {key: config[key] for key in inputs} == inputs
    for name in ("k_proj", "v_proj"):  # auto-round would take the others' for what is not said
        assert config["extra_config"][f"model.layers.0.self_attn.{name}"]["act_bits"] == 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.scheme.name == "INT8" and attention.k_proj.scheme.activation is None
    assert isinstance(attention.v_proj, torch.nn.Linear)
