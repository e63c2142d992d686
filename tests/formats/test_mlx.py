# SPDX-License-Identifier: Apache-2.0
"""MLX checkpoints: exact numbers, mlx-lm's part of config.json, what is refused, and what mlx-lm's own converter writes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tokens
from transformers import AutoModel, AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import UnsupportedLayer, UnsupportedScheme
from hf_autoround.formats import MLXFormat, read_config
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layers.sites import WeightSite
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import integer_scheme

Q, DOWN, HEAD = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"


def write(model, folder, target="mlx", **arguments):
    defaults = {"recipe": "rtn"} if "iters" not in arguments else {}
    AutoRound(str(model), disable_tqdm=True, **defaults, **arguments).quantize_and_save(folder, target)
    return json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else None


def meant_by_mlx(tensors, bits):
    """Return the weight (O, I) that MLX's documentation gives these tensors: one stream of bits for each row."""
    words, scales, biases = (tensors[name] for name in ("weight", "scales", "biases"))
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little").reshape(len(words), -1, bits)
    codes = (stream.astype(np.float64) * 2.0 ** np.arange(bits)).sum(-1)
    size = codes.shape[1] // scales.shape[1]
    scale, bias = (part.double().numpy().repeat(size, axis=1) for part in (scales, biases))
    return torch.from_numpy(codes * scale + bias)


def of_layer(tensors, name):
    return {leaf: tensors[f"{name}.{leaf}"] for leaf in ("weight", "scales", "biases")}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_numbers_that_were_tuned_are_those_that_mlx_makes_of_the_file(bits, tiny_model, tmp_path):
    arguments = {"scheme": f"W{bits}A16G32", "iters": 2, "dataset": tokens(), "batch_size": 4}
    write(tiny_model("llama_wide", torch.bfloat16), tmp_path, "mlx,auto_round", **arguments)
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "auto_round", dtype=torch.float32)
    layers = {name: module for name, module in tuned.named_modules() if isinstance(module, PackedLinear)}
    assert len(layers) == 21
    for name, layer in layers.items():
        assert torch.equal(meant_by_mlx(of_layer(tensors, name), bits), layer.dequantized().double()), name


def test_the_config_says_what_differs_and_what_is_float(tiny_model, tmp_path):
    three = {"bits": 3, "group_size": 32}
    arguments = {"scheme": "W4A16G64", "layer_config": {"q_proj": three}, "ignore_layers": [DOWN]}
    config = write(tiny_model("llama_wide"), tmp_path / "out", **arguments)
    expected = {f"model.layers.{block}.self_attn.q_proj": three for block in range(3)} | {DOWN: False, HEAD: False}
    assert config["quantization"] == {"bits": 4, "group_size": 64, "mode": "affine", **expected}
    assert config["quantization_config"]["packing_format"] == "mlx" and config["rope_theta"] == 10000.0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(f"{name}.weight" in tensors and f"{name}.scales" not in tensors for name in (DOWN, HEAD))
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens()[:2]).logits
    write(tiny_model("llama_wide"), tmp_path / "fake", "fake", **arguments)
    fake = AutoModelForCausalLM.from_pretrained(tmp_path / "fake", dtype=torch.float32)
    assert torch.equal(logits, fake(tokens()[:2]).logits)


def test_loaded_and_saved_it_is_auto_rounds_and_the_same(tiny_model, tmp_path):
    write(tiny_model("llama_wide"), tmp_path / "out", scheme="W4A16G64", layer_config={"q_proj": {"bits": 3}})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization" not in config and config["quantization_config"]["packing_format"] == "mlx"
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    logits = model(tokens()[:2]).logits
    assert torch.equal(again(tokens()[:2]).logits, logits)
    torch.testing.assert_close(model.dequantize()(tokens()[:2]).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_mlx_converts_is_read_with_its_own_biases_and_dtype(dtype, tiny_model, tmp_path):
    """mlx-lm's converter names no method, and its biases are no multiples of scales."""
    config = write(tiny_model("llama_wide"), tmp_path / "out", scheme="W4A16G64")
    del config["quantization_config"]
    config["quantization_config"] = config["quantization"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith((".scales", ".biases")):
            tensors[name] = (tensors[name] * (0.9 + 0.2 * torch.rand(tensors[name].shape, generator=generator))).to(dtype)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    for arguments in ({}, {"quantization_config": AutoRoundConfig()}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **arguments)
        for name in (Q, DOWN):
            expected = meant_by_mlx(of_layer(tensors, name), 4)
            torch.testing.assert_close(model.get_submodule(name).dequantized().double(), expected, rtol=0, atol=1e-7)
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert all(saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(tokens()[:2]).logits, model(tokens()[:2]).logits)


def test_quantized_embeddings_are_refused_by_name(tiny_model, tmp_path):
    write(tiny_model("llama_wide"), tmp_path, scheme="W4A16G64")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"model.embed_tokens.{leaf}": tensor.clone() for leaf, tensor in of_layer(tensors, Q).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedLayer, match=r"model\.embed_tokens is quantized in this mlx checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"scheme": "W7A16G64"}, "it stores 2, 3, 4, 5, 6 or 8 bits, not 7"),
        ({"scheme": "W4A16G64", "group_size": 16}, "groups of 32, 64 or 128 inputs, not group_size=16"),
        ({"scheme": "W4A16G64", "group_size": -1}, "groups of 32, 64 or 128 inputs, not group_size=-1"),
        ({"scheme": "W4A16G64", "sym": False}, "it stores no zero point but its product with the scale"),
        ({"scheme": "W4A16G64", "layer_config": {"q_proj": {"bits": 7}}}, "mlx cannot store model.layers.0.self_attn.q_proj: it"),
    ],
)
@pytest.mark.parametrize("target", ["mlx", "auto_round:mlx", "auto_round,mlx"])
def test_what_mlx_has_no_kernel_for_is_refused_before_any_weight_is_read(target, arguments, why, tiny_model, tmp_path):
    with pytest.raises((UnsupportedLayer, UnsupportedScheme), match=why):
        write(tiny_model("llama_wide"), tmp_path / "out", target, **arguments)
    assert not (tmp_path / "out").exists()


def test_conv1d_and_experts_fused_on_disk_are_not_for_mlx_lm(tiny_model, tmp_path):
    with pytest.raises(UnsupportedLayer, match="mlx-lm turns the weights of a Conv1D"):
        write(tiny_model("gpt2"), tmp_path / "out", scheme="W4A16G32")
    config = write(tiny_model("gpt_oss"), tmp_path / "out", scheme="W4A16G32")
    kept = [name for name, numbers in config["quantization"].items() if numbers is False]
    assert any(".experts." in name for name in kept) and "model.layers.0.self_attn.q_proj" not in kept
    whole = WeightSite("layer", "layer.weight", (64, 96))
    assert "whole groups of 64 inputs, and 96 inputs" in MLXFormat().refuse(whole, integer_scheme(4, 64))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("target", ["auto_round:mlx", "mlx"])
def test_experts_are_loaded_packed_and_saved_apart(target, name, tiny_model, tmp_path):
    arguments = {"scheme": "W4A16G32", "layer_config": {r"layers\.1\..*experts": "W8A16G32"}, "ignore_layers": ["layers.0.mlp"]}
    write(tiny_model(name), tmp_path, f"{target},fake", **arguments)
    fake = AutoModelForCausalLM.from_pretrained(tmp_path / "fake")
    packed, report = AutoModelForCausalLM.from_pretrained(tmp_path / target, output_loading_info=True)
    assert not any(report.values()), report
    experts = [layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear) and ".experts." in name]
    assert sorted(layer.spec.bits for layer in experts) == [4] * 12 + [8] * 12
    rows = tokens()[:2]
    expected = fake(rows).logits
    assert torch.equal(packed(rows).logits, expected)
    packed.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert not any("switch_mlp" in key for key in stored)
    assert sum(key.endswith(".scales") and ".experts." in key for key in stored) == len(experts)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again(rows).logits, expected)
    base = AutoModel.from_pretrained(tmp_path / target)
    assert torch.equal(base(rows).last_hidden_state, fake.model(rows).last_hidden_state)


def test_experts_share_tensors_as_mlx_lm_calls_them(tiny_model, tmp_path, caplog):
    arguments = {
        "scheme": "W4A16G32",
        "layer_config": {r"layers\.1\..*experts.*down_proj": "W8A16G32"},
        "ignore_layers": ["layers.2.mlp"],
    }
    config = write(tiny_model("qwen3_moe"), tmp_path / "out", **arguments)
    assert "experts lie in switch_mlp" in caplog.text
    write(tiny_model("qwen3_moe"), tmp_path / "apart", "auto_round:mlx", **arguments)
    stacked, apart = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "apart"))
    down, gate = (f"model.layers.1.mlp.switch_mlp.{name}_proj" for name in ("down", "gate"))
    for expert in range(4):
        for part in ("weight", "scales", "biases"):
            assert torch.equal(stacked[f"{down}.{part}"][expert], apart[f"model.layers.1.mlp.experts.{expert}.down_proj.{part}"])
    numbers = config["quantization"]
    assert numbers[down] == {"bits": 8, "group_size": 32} and gate not in numbers and f"{gate}.scales" in stacked
    assert numbers["model.layers.2.mlp.switch_mlp.down_proj"] is False
    assert not any(".experts." in name for name in [*numbers, *config["quantization_config"]["extra_config"]])


def test_experts_in_one_tensor_have_one_scheme():
    """Also where each is a layer of its own in memory, so that nothing else asks for it."""
    names = [f"model.layers.0.mlp.experts.{expert}.w1" for expert in (0, 1)]
    sites = tuple(WeightSite(name, f"{name}.weight", (64, 64)) for name in names)
    four, eight = integer_scheme(4, 64), integer_scheme(8, 64)
    same = QuantPlan(four, sites, dict.fromkeys(names, four), {}, "model.layers")
    assert MLXFormat().refuse_plan(same) is None
    assert MLXFormat().stack(names[1]) == ("model.layers.0.mlp.switch_mlp.gate_proj", 1)
    for mixed in (
        QuantPlan(four, sites, {names[0]: four, names[1]: eight}, {}, "model.layers"),
        QuantPlan(four, sites[:1], {names[0]: four}, {names[1]: "ignore_layers names it"}, "model.layers"),
    ):
        assert "it stores the experts of a layer in one tensor" in MLXFormat().refuse_plan(mixed)


def test_single_layers_differ_only_where_mlx_lm_has_the_same_names():
    names = ["layers.0.attention.dense", "layers.1.attention.dense"]
    four, eight = integer_scheme(4, 64), integer_scheme(8, 64)
    for blocks, renamed in (("model.layers", False), ("gpt_neox.layers", True)):
        sites = tuple(WeightSite(f"{blocks}.{name}", f"{blocks}.{name}.weight", (64, 64)) for name in names)
        mixed = QuantPlan(four, sites, dict(zip((site.name for site in sites), (four, eight), strict=True)), {}, blocks)
        assert (MLXFormat().refuse_plan(mixed) is not None) == renamed


def test_its_configuration_is_read_as_mlx_lm_means_it():
    stored = read_config(
        {"quant_method": "mlx", "bits": 4, "group_size": 64, "sym": True, Q: {"bits": 8, "group_size": 32}, DOWN: False}
    )
    assert stored.scheme_of(Q, True) == integer_scheme(8, 32, False) and stored.scheme_of(DOWN, True) is None
    assert stored.scheme_of(DOWN.replace("1", "2"), True) == integer_scheme(4, 64, False)
    with pytest.raises(UnsupportedScheme, match="mode 'mxfp4' is not supported; there is affine"):
        read_config({"quant_method": "mlx", "bits": 4, "group_size": 32, "mode": "mxfp4"})
