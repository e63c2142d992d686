# SPDX-License-Identifier: Apache-2.0
"""Format llm_compressor: what differs within one checkpoint, and what its readers could not take."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import UnsupportedLayer

QUICK = {"recipe": "rtn", "disable_tqdm": True}


def test_the_same_weights_with_and_without_quantized_inputs_lie_in_two_forms(tiny_model, tmp_path):
    arguments = {"scheme": "INT8", "layer_config": {"down_proj": {"act_bits": 16}}}
    AutoRound(str(tiny_model("llama")), **arguments, **QUICK).quantize_and_save(tmp_path, "llm_compressor,fake")
    folder = tmp_path / "llm_compressor"
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["format"] for group in groups.values()] == ["int-quantized", "pack-quantized"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=AutoRoundConfig(), dtype=torch.float32)
    fake = AutoModelForCausalLM.from_pretrained(tmp_path / "fake", dtype=torch.float32)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        own, plain = (model.model.layers[1].get_submodule(name) for model in (loaded, fake))
        torch.testing.assert_close(own.dequantized(), plain.weight.data, rtol=2**-8, atol=0)


@pytest.mark.parametrize("target", ["llm_compressor", "fp8"])
@pytest.mark.parametrize(
    ("model", "why"), [("gpt2", "its readers take a Linear, and it is a Conv1D"), ("gpt_oss", "the checkpoint fuses them")]
)
def test_what_its_readers_would_not_find_is_refused(tiny_model, tmp_path, target, model, why):
    with pytest.raises(UnsupportedLayer, match=why):
        AutoRound(
            str(tiny_model(model)), scheme="FP8_BLOCK", ignore_layers=["self_attn"] if model == "gpt_oss" else [], **QUICK
        ).quantize_and_save(tmp_path / "out", target)


@pytest.mark.parametrize("target", ["auto_round", "llm_compressor", "auto_awq"])
def test_what_stays_in_16_bits_is_called_as_the_file_calls_it(tiny_model, tmp_path, target):
    arguments = {"scheme": "W4A16", "group_size": 32, "ignore_layers": ["layers.0.mlp"]}
    AutoRound(str(tiny_model("mixtral")), **arguments, **QUICK).quantize_and_save(tmp_path, target)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    key = {"llm_compressor": "ignore", "auto_awq": "modules_to_not_convert", "auto_round": "extra_config"}[target]
    listed = set(config[key])
    assert {"model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.experts.0.w1"} <= listed
    assert ("model.layers.0.mlp.gate" in listed) == (target != "auto_round")  # transformers' own readers know no other name
