# SPDX-License-Identifier: Apache-2.0
"""Format fp8: transformers' own fine-grained FP8 loader reads the weights that we write."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import CalibrationError, UnsupportedLayer, UnsupportedScheme
from hf_autoround.formats import FORMATS
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layers.sites import WeightSite
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.registry import find
from hf_autoround.scheme import resolve_scheme


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="the fp8 loader of transformers 5.16 fails on models without experts",
)
def test_transformers_reads_the_same_weights(tiny_model, tmp_path):
    AutoRound(
        str(tiny_model("llama_wide")), scheme="FP8_BLOCK", recipe="rtn", ignore_layers=["layers.1.mlp"], disable_tqdm=True
    ).quantize_and_save(tmp_path / "out", "fp8")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=AutoRoundConfig())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True  # as it does by itself where there is no GPU
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 18
    for name, layer in layers.items():
        assert torch.equal(layer.dequantized(), theirs.get_submodule(name).weight)
    assert torch.isfinite(theirs(tokens()[:1]).logits).all()


def test_what_would_be_read_as_floats_is_refused_by_name(tiny_model, tmp_path):
    AutoRound(str(tiny_model("llama_wide")), scheme="FP8_BLOCK", recipe="rtn", disable_tqdm=True).quantize_and_save(
        tmp_path / "out", "fp8"
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.embed_tokens.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedLayer, match=r"model\.embed_tokens is quantized in this float8 checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=AutoRoundConfig())


@pytest.mark.parametrize(
    ("shape", "taken"), [((128, 256), True), ((64, 96), True), ((192, 256), False), ((256, 320), False), ((96, 384), True)]
)
def test_what_is_larger_than_a_block_is_whole_blocks(shape, taken):
    target = find(FORMATS, "fp8", kind="format")
    reason = target.refuse(WeightSite("layer", "layer.weight", shape), resolve_scheme("FP8_BLOCK"))
    assert (reason is None) == taken
    assert taken or reason == f"its shape {shape} is not whole blocks of 128 both ways"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scheme": "FP8_STATIC", "format": "fp8"}, "it stores FP8_BLOCK, not FP8_STATIC"),
        ({"scheme": "MXINT4", "format": "llm_compressor"}, "compressed-tensors has no mx_int"),
        ({"scheme": "MXFP4_RCEIL", "format": "llm_compressor"}, "does not round inputs as mx_fp_rceil does"),
        ({"scheme": "INT8", "format": "auto_gptq"}, "it stores weights alone.*hf-autoround list formats shows what stores what"),
        ({"scheme": "W4A16G32", "format": "llm_compressor", "quant_lm_head": True}, "its readers keep lm_head in 16 bits"),
        ({"scheme": "MXFP4", "sym": False}, r"is not possible: mx_fp has no zero points"),
        ({"scheme": "MXFP4", "group_size": 64}, "mx_fp has groups of 32, not group_size=64"),
        ({"scheme": "NVFP4", "bits": 8}, "nv_fp has 4 bits, not 8"),
        ({"scheme": "W4A16", "group_size": 0}, "integers have a scale for each row or group"),
        ({"scheme": "INT8", "act_group_size": 0}, "need act_dynamic=False"),
        ({"scheme": "INT8", "act_dynamic": False}, "need act_group_size=0"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_with_a_sentence(arguments, says, tiny_model, tmp_path):
    target = arguments.pop("format", "auto_round")
    rounding = AutoRound(str(tiny_model("llama")), recipe="rtn", dataset=tokens(), disable_tqdm=True, **arguments)
    with pytest.raises((UnsupportedScheme, UnsupportedLayer), match=says):
        rounding.quantize_and_save(tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ("FPW8A16", "auto_round with other numbers than integers: "),
        ("INT8", "auto_round with quantized inputs: "),
        ("MXFP4", "auto_round with quantized inputs and other numbers than integers: "),
        ("W4A16", None),
    ],
)
def test_what_vllm_does_not_read_in_auto_round_is_told(scheme, says, tiny_model, tmp_path, caplog):
    AutoRound(str(tiny_model("llama")), scheme=scheme, recipe="rtn", disable_tqdm=True).quantize_and_save(tmp_path / "out")
    assert (
        f"{says}hf_autoround reads it, and most of it auto-round; for vLLM take llm_compressor" in caplog.text
        if says
        else "vLLM" not in caplog.text
    )


def test_why_rounding_to_nearest_needs_data_is_said(tiny_model, tmp_path):
    rounding = AutoRound(str(tiny_model("llama")), scheme="NVFP4", recipe="rtn", dataset="nowhere.txt", disable_tqdm=True)
    with pytest.raises(CalibrationError, match=r"NVFP4 has to see data even to round to nearest: .*nowhere\.txt"):
        rounding.quantize_and_save(tmp_path / "out")


def test_layers_of_the_wrong_shape_stay_in_16_bits_unless_they_are_named(tiny_model, tmp_path):
    arguments = {"scheme": "W4A16G32", "recipe": "rtn", "disable_tqdm": True}
    model = str(tiny_model("gpt2"))
    with pytest.raises(UnsupportedScheme, match=r"c_proj cannot have .*: it needs a multiple of 48 inputs, not 64"):
        layers = {"c_proj": {"act_bits": 8, "act_group_size": 48}}
        AutoRound(model, layer_config=layers, **arguments).quantize_and_save(tmp_path / "out")
    AutoRound(model, act_bits=8, act_group_size=96, **arguments).quantize_and_save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed = [name for name, layer in loaded.named_modules() if isinstance(layer, PackedLinear)]
    assert packed and not [name for name in packed if name.endswith("mlp.c_proj")]


def test_experts_stay_in_16_bits_together(tiny_model, tmp_path):
    arguments = {"scheme": "FP8_BLOCK", "recipe": "rtn", "disable_tqdm": True}
    AutoRound(str(tiny_model("qwen3_moe")), ignore_layers=["experts"], **arguments).quantize_and_save(tmp_path / "out", "fp8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.experts" in config["modules_to_not_convert"]
    scheme = resolve_scheme("FP8_BLOCK")
    names = [f"model.layers.1.mlp.experts.0.{leaf}" for leaf in ("up_proj", "down_proj")]
    some = QuantPlan(
        scheme, (WeightSite(names[0], f"{names[0]}.weight", (64, 64)),), {names[0]: scheme}, {names[1]: ""}, "model.layers"
    )
    assert f"the experts of a layer together, and {names[1]} would stay" in find(FORMATS, "fp8", kind="format").refuse_plan(some)
