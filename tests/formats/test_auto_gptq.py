# SPDX-License-Identifier: Apache-2.0
"""GPTQ configurations: what we write means the same to every reader, and what others write is read as they mean it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tokens
from transformers import AutoModelForCausalLM
from transformers import AutoRoundConfig as TransformersAutoRoundConfig

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import UnsupportedLayer, UnsupportedScheme
from hf_autoround.formats import read_config
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.scheme import BF16, integer_scheme

BASE = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
Q, K, OUT = (f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "o_proj"))
DOWN = "model.layers.1.mlp.down_proj"


def written(model, folder, **arguments):
    AutoRound(str(model), recipe="rtn", disable_tqdm=True, **arguments).quantize_and_save(folder, "auto_gptq")
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def dynamic(rules, name):
    """What gptqmodel and vLLM make of `dynamic`: the first rule that matches from the start of a name decides."""
    return next((key[:2] == "+:" and value for key, value in rules.items() if re.match(key[2:], name)), None)


def test_rules_are_found_under_the_names_of_fused_layers_where_they_agree(tiny_model, tmp_path):
    config = written(
        tiny_model("llama"),
        tmp_path / "out",
        scheme="W4A16G32",
        layer_config={r"layers\.1\.self_attn\.[qkv]_proj": {"bits": 8}, "layers.2.self_attn.q_proj": {"bits": 8}},
        ignore_layers=["layers.0.mlp", "layers.1.mlp.down_proj"],
    )
    rules = config["dynamic"]
    eight = {"bits": 8, "group_size": 32, "sym": True}
    for leaf in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        assert dynamic(rules, f"model.layers.1.self_attn.{leaf}") == eight
    assert dynamic(rules, "model.layers.2.self_attn.q_proj") == eight
    assert dynamic(rules, "model.layers.2.self_attn.k_proj") is dynamic(rules, "model.layers.2.self_attn.qkv_proj") is None
    for name in ("layers.0.mlp.gate_up_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"):
        assert dynamic(rules, f"model.{name}") is False
    assert dynamic(rules, "model.layers.2.mlp.down_proj") is dynamic(rules, "model.layers.10.mlp.up_proj") is None


def test_what_stays_in_16_bits_is_listed_for_transformers_too(tiny_model, tmp_path):
    config = written(tiny_model("llama"), tmp_path / "out", scheme="W4A16G32", ignore_layers=["layers.0.mlp.down_proj", "o_proj"])
    (listed,) = config["modules_in_block_to_quantize"]
    packed = {name.removesuffix(".qweight") for name in load_file(tmp_path / "out" / "model.safetensors") if "qweight" in name}
    names = [f"model.layers.{block}.{leaf}" for block in range(3) for leaf in (Q[15:], K[15:], OUT[15:], DOWN[15:])]
    for name in names:
        assert any(name.endswith(ending) for ending in listed) == (name in packed), name  # optimum's rule
    assert "modules_in_block_to_quantize" not in written(tiny_model("llama"), tmp_path / "all", scheme="W4A16G32")


def test_asymmetric_checkpoints_are_version_two_and_hold_groups_in_order(tiny_model, tmp_path):
    assert written(tiny_model("llama"), tmp_path / "sym", scheme="W4A16G32")["checkpoint_format"] == "gptq"
    config = written(tiny_model("llama"), tmp_path / "out", scheme="W4A16G32", layer_config={"o_proj": {"sym": False}})
    assert config["checkpoint_format"] == "gptq_v2" and config["sym"] is True and config["desc_act"] is False
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors[f"{DOWN}.g_idx"], torch.arange(96, dtype=torch.int32) // 32)


def test_experts_have_one_rule_and_the_head_is_named(tiny_model, tmp_path):
    config = written(
        tiny_model("qwen3_moe"), tmp_path / "out", scheme="W4A16G32", layer_config={r"layers\.1\.mlp\.experts": {"bits": 8}},
        quant_lm_head=True,
    )  # fmt: skip
    assert config["lm_head"] is True
    assert dynamic(config["dynamic"], "model.layers.1.mlp.experts")["bits"] == 8
    assert dynamic(config["dynamic"], "model.layers.1.mlp.experts.3.up_proj")["bits"] == 8
    assert dynamic(config["dynamic"], "model.layers.1.mlp.gate") is False
    assert dynamic(config["dynamic"], "model.layers.2.mlp.experts") is None
    stored = read_config(config)
    assert stored.scheme_of("lm_head", False) == stored.scheme == integer_scheme(4, 32)
    assert stored.scheme_of("model.layers.1.mlp.experts.3.up_proj", True) == integer_scheme(8, 32)
    assert stored.scheme_of("model.layers.1.mlp.gate", True) is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {Q: integer_scheme(4), "lm_head": BF16}),
        ({"lm_head": True}, {"lm_head": integer_scheme(4)}),
        ({"checkpoint_format": "gptq_v2", "sym": False}, {Q: integer_scheme(4, sym=False)}),
        ({"dynamic": {"+:.*q_proj": {"bits": 8}, "-:.*k_proj": {}}}, {Q: integer_scheme(8), K: BF16, OUT: integer_scheme(4)}),
        ({"dynamic": {r".*\.1\..*": {"group_size": 32, "sym": False}}}, {Q: integer_scheme(4, 32, False), "lm_head": BF16}),
        ({"dynamic": {"-:.*q_proj": {}, "+:.*": {"bits": 8}}}, {Q: BF16, K: integer_scheme(8)}),  # the first one decides
        ({"dynamic": {"+:.*": {"bits": 8}, "-:.*q_proj": {}}}, {Q: integer_scheme(8)}),
        ({"dynamic": {"+:q_proj": {"bits": 8}}}, {Q: integer_scheme(4)}),  # matched from the start of the name
        ({"dynamic": {"+:lm_head": {"bits": 8}}, "lm_head": True}, {"lm_head": integer_scheme(8)}),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]}, {Q: integer_scheme(4), K: BF16}),
    ],
)
def test_others_configurations_are_read_as_they_mean_them(more, expected):
    stored = read_config({**BASE, **more})
    for name, scheme in expected.items():
        chosen = stored.scheme_of(name, inside_blocks=name != "lm_head")
        assert chosen == (None if scheme == BF16 else scheme), name


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"bits": 5}, "a GPTQ checkpoint of 5 bits is not supported"),
        ({"dynamic": {"+:.*": {"bits": 6}}}, "of 6 bits"),
        ({"checkpoint_format": "marlin"}, "format 'marlin' is not supported; there are gptq, gptq_v2"),
        ({"is_marlin_format": True}, "format 'marlin'"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"dynamic": {"-:(": {}}}, "is no regular expression"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; there are auto-round"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(more, why):
    with pytest.raises(UnsupportedScheme, match=why):
        read_config({**BASE, **more})


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_act_order_is_computed_with_each_inputs_own_group(version, tiny_model, tmp_path):
    """Rows and `g_idx` permuted together mean the permuted weight: the expectation needs no code of the reader."""
    folder = tmp_path / "out"
    asym = {"sym": False} if version == "gptq_v2" else {}
    written(tiny_model("llama"), folder, scheme="W8A16G32", **asym)  # a row of 8-bit codes fills a byte of each word
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=AutoRoundConfig())
    weight = plain.get_submodule(DOWN).dequantized()
    tensors = load_file(folder / "model.safetensors")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    rows = tensors[f"{DOWN}.qweight"].t().contiguous().view(torch.uint8)[:, order].contiguous()
    tensors[f"{DOWN}.qweight"] = rows.view(torch.int32).t().contiguous()
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"][order].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=AutoRoundConfig(), output_loading_info=True
    )
    assert not any(report.values()), report
    assert torch.equal(model.get_submodule(DOWN).dequantized(), weight[:, order])
    assert sum(module.layout.name.endswith("indexed") for module in model.modules() if isinstance(module, PackedLinear)) == 1
    logits = model(tokens()[:2]).logits
    model.save_pretrained(tmp_path / "again")
    # auto_round form cannot say it, so it is saved in its own
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["checkpoint_format"]) == ("gptq", version)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32, quantization_config=AutoRoundConfig())
    assert torch.equal(again(tokens()[:2]).logits, logits)
    tensors[f"{DOWN}.g_idx"][7] = 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedLayer, match=rf"{DOWN}.g_idx names groups that are not there: W8A16G32(-asym)? makes 3"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=AutoRoundConfig())


@pytest.mark.parametrize("config_class", [AutoRoundConfig, TransformersAutoRoundConfig], ids=["ours", "transformers"])
def test_a_mixed_gptq_checkpoint_is_loaded_saved_as_auto_round_and_loaded_again(config_class, tiny_model, tmp_path):
    folder = tmp_path / "out"
    written(tiny_model("llama"), folder, scheme="W4A16G32", layer_config={"q_proj": {"bits": 8}}, ignore_layers=["layers.1.mlp"])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:5.0.0"]}  # transformers' own conversion refuses it
    path.write_text(json.dumps(config))
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config_class(), output_loading_info=True
    )
    assert not any(report.values()), report
    logits = model(tokens()[:2]).logits
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "auto-round" and saved["packing_format"] == "auto_round:auto_gptq"
    assert saved["extra_config"]["model.layers.0.self_attn.q_proj"]["bits"] == 8
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(tokens()[:2]).logits, logits)
