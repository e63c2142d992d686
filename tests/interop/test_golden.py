# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that auto-round 0.16.1 wrote: ours loads them with the weights the file holds, and writes the same tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import UnsupportedScheme
from hf_autoround.layers.packed_linear import PackedLinear

TOKENS = torch.randint(3, 416, (8, 32), generator=torch.Generator().manual_seed(0))

# folder: (float model, arguments of the same plain round to nearest, relative error of its weights)
GOLDEN = {
    "llama_w4_mf": ("llama", {"scheme": "W4A16"}, 0.104),
    "llama_w3_ar": ("llama", {"scheme": "W3A16"}, 0.208),
    "llama_w8_ar": ("llama", {"scheme": "W8A16"}, 0.0065),
    "llama_w2g32_ar": ("llama", {"scheme": "W2A16G32"}, 0.364),
    "llama_w2g32asym_ar": ("llama", {"scheme": "W2A16G32", "sym": False}, 0.408),
    "llama_w4asym_ar": ("llama", {"scheme": "W4A16", "sym": False}, 0.101),
    "mf_w4asym": ("llama", None, 0.101),  # the same numbers as llama_w4asym_ar in another layout
    "mf_w2asym": ("llama", None, None),
    "llama_w4_mixed": (
        "llama",
        {
            "scheme": "W4A16",
            "layer_config": {"k_proj": {"bits": 2, "group_size": 32}, "layers.0.self_attn.q_proj": {"bits": 8, "group_size": 32}},
            "ignore_layers": ["o_proj", "down_proj"],
        },
        None,
    ),
    "moe_w4": ("qwen3moe", {"scheme": "W4A16"}, 0.104),
    "llama_w4_gptq": ("llama", {"scheme": "W4A16"}, 0.104),
    "llama_w3_gptq": ("llama", {"scheme": "W3A16"}, 0.208),
    "llama_w4_mixed_gptq": (
        "llama",
        {
            "scheme": "W4A16",
            "layer_config": {"k_proj": {"bits": 2, "group_size": 32}, "layers.0.self_attn.q_proj": {"bits": 8, "group_size": 32}},
            "ignore_layers": ["down_proj"],
        },
        None,
    ),
    "llama_w4_awq": ("llama", {"scheme": "W4A16"}, 0.104),
    "llama_w4_ct": ("llama", {"scheme": "W4A16"}, 0.104),
    "llama_int8_ct": ("llama", {"scheme": "INT8"}, None),
    "llama_mxfp4_ct": ("llama", {"scheme": "MXFP4"}, 0.114),
    "llama_mxfp8_ct": ("llama", {"scheme": "MXFP8"}, 0.0295),
    "llama_nvfp4_ct": ("llama", {"scheme": "NVFP4", "dataset": TOKENS}, 0.0955),
    "llama_mxfp4_ar": ("llama", {"scheme": "MXFP4"}, 0.114),
    "llama_mxfp8_ar": ("llama", {"scheme": "MXFP8"}, 0.0295),
    "llama_mxint4_ar": ("llama", {"scheme": "MXINT4"}, 0.122),
    "llama_nvfp4_ar": ("llama", {"scheme": "NVFP4", "dataset": TOKENS}, 0.0955),
    # theirs have codes for scales in float32 and then store those in bfloat16
    "llama_fp8static_ar": ("llama", None, 0.026),
    "llama_fp8block_ar": ("llama", None, 0.0265),
    "llama_fpw8_ar": ("llama", None, 0.026),
    "llama_w4_mlx": ("llama", None, 0.0953),
    "llama_w5_mlx": ("llama", None, 0.0476),
}
ACTIVATIONS = ("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym")
COMMON = ("bits", "group_size", "sym", "quant_method")
KEYS = {  # of the configuration: what other readers look for
    "auto_round": (*COMMON, "data_type", "packing_format", "block_name_to_quantize"),
    "auto_gptq": (*COMMON, "desc_act", "lm_head", "true_sequential", "damp_percent"),
    "auto_awq": (*COMMON, "version", "zero_point", "modules_to_not_convert"),
    "llm_compressor": ("quant_method", "format", "quantization_status", "ignore"),
}


def written_by(name):
    return {"gptq": "auto_gptq", "awq": "auto_awq", "ct": "llm_compressor"}.get(name.rpartition("_")[2], "auto_round")


def checkpoint(shared, name):
    return next(path.parent for path in sorted((shared / "golden" / name).rglob("config.json")))


@pytest.mark.parametrize("name", GOLDEN)
def test_ours_loads_it_with_the_right_weights(name, shared):
    source, _, expected = GOLDEN[name]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(shared, name), dtype=torch.float32, quantization_config=AutoRoundConfig()
    )
    exact = load_file(shared / "golden" / source / "model.safetensors")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert layers
    for path, layer in layers.items():
        weight = exact[f"{path}.weight"].float()
        error = ((layer.dequantized() - weight).norm() / weight.norm()).item()
        assert expected is None or error == pytest.approx(expected, rel=0.03), path
        limits = {2: 0.6, 4: 0.11, 3: 0.22, 5: 0.05, 8: 0.01} if layer.spec.data_type == "int" else {4: 0.13, 8: 0.031}
        assert error < limits[layer.spec.bits]
    assert torch.isfinite(model(torch.arange(3, 35)[None]).logits).all()


def same(mine, other):
    return mine.dtype == other.dtype and torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("name", [name for name, (_, arguments, _) in GOLDEN.items() if arguments is not None])
def test_our_round_to_nearest_equals_theirs_tensor_for_tensor(name, shared, tmp_path):
    source, arguments, _ = GOLDEN[name]
    AutoRound(str(shared / "golden" / source), recipe="rtn", disable_tqdm=True, **arguments).quantize_and_save(
        tmp_path / "out", written_by(name)
    )
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(checkpoint(shared, name) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    calibrated = {key for key in ours if key.endswith("input_global_scale")}  # on other data
    different = [key for key in ours.keys() - calibrated if not same(ours[key], theirs[key])]
    assert not different
    config, other = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "out", checkpoint(shared, name))
    )
    for key in KEYS[written_by(name)]:
        assert config[key] == other[key], key
    assert {key: config.get(key) for key in ACTIVATIONS} == {key: other.get(key) for key in ACTIVATIONS}


def test_rotated_weights_are_refused(shared):
    with pytest.raises(UnsupportedScheme, match="rotated weights"):
        AutoModelForCausalLM.from_pretrained(checkpoint(shared, "llama_mxfp4_had"))


def test_a_file_that_contradicts_its_config_is_loaded_as_float_with_a_warning(shared, caplog, tmp_path):
    folder = checkpoint(shared, "llama_w4_lmhead")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert "lm_head should have W4A16 by the checkpoint's config, but the file holds it as float" in caplog.text
    rows = torch.arange(3, 35)[None]
    logits = model(rows).logits
    assert torch.isfinite(logits).all() and isinstance(model.lm_head, torch.nn.Linear)
    model.save_pretrained(tmp_path / "mended")
    caplog.clear()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mended", dtype=torch.float32)
    assert "should have" not in caplog.text, "what is saved says what it holds"
    assert torch.equal(again(rows).logits, logits)
