# SPDX-License-Identifier: Apache-2.0
"""What engines fuse: mixed schemes inside it are told, and only those."""

import pytest
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.planning.fused import fused_units
from hf_autoround.scheme import BF16, integer_scheme

FOUR = integer_scheme(4)


def test_every_layer_is_in_one_unit_named_as_vllm_names_it():
    units = {
        "a.qkv_proj": ["a.q_proj", "a.k_proj", "a.v_proj"],
        "a.o_proj": ["a.o_proj"],
        "m.gate_up_proj": ["m.gate_proj", "m.up_proj"],
        "m.experts": ["m.experts.0.up_proj", "m.experts.1.w2"],
        "head": ["head"],
    }
    found = fused_units({name: FOUR for members in units.values() for name in members})
    assert {unit: list(members) for unit, members in found.items()} == units
    assert fused_units({"q_proj": FOUR, "k_proj": BF16}) == {"qkv_proj": {"q_proj": FOUR, "k_proj": BF16}}


CASES = {
    "q": (
        {"layer_config": {"layers.1.self_attn.q_proj": {"bits": 8}}},
        "model.layers.1.self_attn.q_proj has W8A16G32, model.layers.1.self_attn.k_proj has W4A16G32: vLLM and SGLang fuse",
    ),
    "up": (
        {"ignore_layers": ["up_proj"]},
        "model.layers.0.mlp.gate_proj has W4A16G32, model.layers.0.mlp.up_proj has BF16, and so in 2 more places: vLLM",
    ),
    "whole units": ({"layer_config": {"o_proj": {"bits": 8}, "down_proj": {"bits": 8}, "[qkv]_proj": {"bits": 8}}}, None),
}


@pytest.mark.parametrize("target", ["auto_round", "auto_gptq"])
@pytest.mark.parametrize("case", CASES)
def test_a_mixed_scheme_inside_a_fused_layer_is_told(target, case, tiny_model, tmp_path, caplog):
    arguments, said = CASES[case]
    AutoRound(str(tiny_model("llama")), recipe="rtn", scheme="W4A16G32", disable_tqdm=True, **arguments).quantize_and_save(
        tmp_path / "out", target
    )
    assert ("fuse q/k/v, gate/up" in caplog.text) == (said is not None)
    assert said is None or said in caplog.text


def test_it_is_told_while_a_model_is_loaded_too(tiny_model, caplog):
    arguments, said = CASES["q"]
    AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"), quantization_config=AutoRoundConfig(scheme="W4A16G32", iters=0, disable_opt_rtn=True, **arguments)
    )
    assert said in caplog.text
