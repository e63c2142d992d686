# SPDX-License-Identifier: Apache-2.0
"""Float8 checkpoints are sources like any other: read as values times scales, written without a trace of float8."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound
from hf_autoround.errors import CheckpointError
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.models.loading import open_model

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 40]}
TENSOR = {"quant_method": "fp8", "weight_block_size": None}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


def store_in_float8(source, folder, config):
    """Write a tiny model's projections as float8 by plain loops, and return what they then mean."""
    folder.mkdir()
    tensors, meant = load_file(source / "model.safetensors"), {}
    suffix = "weight_scale_inv" if config["quant_method"] == "fp8" else "weight_scale"
    block = config.get("weight_block_size")
    for key in [key for key in tensors if "_proj" in key]:
        weight = tensors[key].float()
        scale, exact = torch.ones(1), torch.empty_like(weight)
        if block:
            rows, columns = range(0, len(weight), block[0]), range(0, weight.shape[1], block[1])
            scale = torch.stack(
                [torch.stack([weight[r : r + block[0], c : c + block[1]].abs().amax() / 448 for c in columns]) for r in rows]
            )
        elif suffix == "weight_scale":
            scale = weight.abs().amax(1, keepdim=True) / 448
        codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                own = scale[row // block[0], column // block[1]] if block else scale[row, 0] if scale.ndim == 2 else scale[0]
                codes[row, column] = weight[row, column] / own
                exact[row, column] = codes[row, column].float() * own
        path = key.removesuffix(".weight")
        tensors[key], tensors[f"{path}.{suffix}"], meant[key] = codes, scale, exact
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model_config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(model_config | {"quantization_config": config}))
    return meant


@pytest.mark.parametrize("config", [FP8, TENSOR, CHANNEL], ids=["blocks", "tensor", "channel"])
def test_weights_are_values_times_scales_and_the_result_is_an_ordinary_checkpoint(config, tiny_model, tmp_path):
    meant = store_in_float8(tiny_model("llama"), tmp_path / "float8", config)
    lazy = open_model(tmp_path / "float8")
    read = dict(lazy.checkpoint.read(lazy.checkpoint.entries))
    assert not [key for key in read if "scale" in key]
    for key, weight in meant.items():
        assert torch.equal(read[key], weight), key  # the model is a float32 one
    out = tmp_path / "out"
    AutoRound(str(tmp_path / "float8"), scheme="W8A16G32", recipe="rtn", disable_tqdm=True).quantize_and_save(
        out, "auto_round,fake"
    )
    assert "quantization_config" not in json.loads((out / "fake" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out / "auto_round", dtype=torch.float32)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == len(meant)
    fake = AutoModelForCausalLM.from_pretrained(out / "fake", dtype=torch.float32)
    assert torch.equal(model(tokens()[:2]).logits, fake(tokens()[:2]).logits)
    key, weight = next(iter(meant.items()))
    assert (model.get_submodule(key.removesuffix(".weight")).dequantized() - weight).norm() < 0.01 * weight.norm()


def test_a_scale_that_is_missing_or_fits_nothing_is_named(tiny_model, tmp_path):
    store_in_float8(tiny_model("llama"), tmp_path / "float8", CHANNEL)
    tensors, key = load_file(tmp_path / "float8" / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[f"{key}_scale"] = torch.ones(3, 2)
    save_file(tensors, tmp_path / "float8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is 96 x 64 and its scale \(3, 2\)"):
        list(open_model(tmp_path / "float8").checkpoint.read([key]))
    del tensors[f"{key}_scale"]
    save_file(tensors, tmp_path / "float8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no model\.layers\.1\.mlp\.up_proj\.weight_scale"):
        open_model(tmp_path / "float8")


@pytest.mark.parametrize("name", ["llama_fp8block_fp8", "llama_fp8block_ct", "llama_fp8static_ct"])
def test_what_another_tool_wrote_is_near_the_float_model(name, shared):
    folder = next(path.parent for path in sorted((shared / "golden" / name).rglob("config.json")))
    exact = load_file(shared / "golden" / "llama" / "model.safetensors")
    checkpoint = open_model(folder).checkpoint
    keys = [key for key in exact if key.endswith("_proj.weight")]
    assert len(keys) == 14
    for key, weight in checkpoint.read(keys):
        assert (weight.float() - exact[key].float()).norm() < 0.027 * exact[key].float().norm(), key
