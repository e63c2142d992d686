# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other tools load with AutoRoundConfig(), compute what they say, and are saved in auto_round form."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tokens
from transformers import AutoModelForCausalLM
from transformers import AutoRoundConfig as TransformersAutoRoundConfig

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import CheckpointError, UnsupportedLayer, UnsupportedScheme
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layouts import PackQuantized

GOLDEN = ["llama_w4_gptq", "llama_w3_gptq", "llama_w4_mixed_gptq", "llama_w4_awq", "llama_w4_ct", "llama_int8_ct"]
GOLDEN += ["llama_mxfp4_ct", "llama_mxfp8_ct", "llama_nvfp4_ct", "llama_fp8static_ct", "llama_fp8block_ct", "llama_fp8block_fp8"]
ERRORS = {"int": {2: (0.35, 0.4), 3: (0.2, 0.22), 4: (0.1, 0.106), 8: (0.004, 0.0075)}}  # relative, of round to nearest
ERRORS |= {"mx_fp": {4: (0.11, 0.116), 8: (0.028, 0.031)}, "nv_fp": {4: (0.094, 0.097)}, "fp": {8: (0.025, 0.028)}}


def load(folder, config=None):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config or AutoRoundConfig(), output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def write(model, folder, target, **arguments):
    AutoRound(str(model), recipe="rtn", disable_tqdm=True, **arguments).quantize_and_save(folder, f"{target},fake")
    return folder / target, folder / "fake"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def assert_saves_in_auto_round_form(model, folder):
    rows = tokens()[:2]
    logits = model(rows).logits
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "auto-round" and config["packing_format"].startswith("auto_round")
    again, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again(rows).logits, logits)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_another_tool_wrote_loads(name, shared, tmp_path):
    folder = next(path.parent for path in sorted((shared / "golden" / name).rglob("config.json")))
    model = load(folder)
    exact = load_file(shared / "golden" / "llama" / "model.safetensors")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(layers) == (12 if "mixed" in name else 14)
    for path, layer in layers.items():
        weight = exact[f"{path}.weight"].float()
        low, high = ERRORS[layer.spec.data_type][layer.spec.bits]
        assert low < (layer.dequantized() - weight).norm() / weight.norm() < high, path
    assert_saves_in_auto_round_form(model, tmp_path / "saved")


@pytest.mark.parametrize("config", [AutoRoundConfig, TransformersAutoRoundConfig], ids=["ours", "transformers'"])
@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("auto_gptq", {"scheme": "W4A16G32"}),
        ("auto_gptq", {"scheme": "W2A16G32", "sym": False}),
        (
            "auto_gptq",
            {"scheme": "W8A16", "group_size": -1, "layer_config": {"k_proj": {"bits": 3}}, "ignore_layers": ["o_proj"]},
        ),
        ("auto_gptq", {"scheme": "W4A16G32", "quant_lm_head": True}),
        ("auto_awq", {"scheme": "W4A16G32"}),
        ("auto_awq", {"scheme": "W4A16G32", "sym": False, "ignore_layers": ["layers.1"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_what_we_write_in_their_form_loads(target, arguments, config, tiny_model, tmp_path):
    packed, fake = write(tiny_model("llama"), tmp_path / "out", target, **arguments)
    rows = tokens()[:2]
    model = load(packed, config())
    expected = AutoModelForCausalLM.from_pretrained(fake, dtype=torch.float32)(rows).logits
    assert torch.equal(model(rows).logits, expected)
    assert_saves_in_auto_round_form(model, tmp_path / "saved")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_of_gptq_files_load(name, tiny_model, tmp_path):
    packed, fake = write(tiny_model(name), tmp_path / "out", "auto_gptq", scheme="W4A16G32")
    rows = tokens()[:2]
    model = load(packed)
    assert torch.equal(model(rows).logits, AutoModelForCausalLM.from_pretrained(fake, dtype=torch.float32)(rows).logits)
    assert_saves_in_auto_round_form(model, tmp_path / "saved")


def test_what_gptqmodel_notes_in_its_files_does_not_matter(tiny_model, tmp_path):
    packed, _ = write(tiny_model("llama"), tmp_path / "out", "auto_gptq", scheme="W4A16G32")
    logits = load(packed)(tokens()).logits
    edit_config(
        packed, meta={"quantizer": ["gptqmodel:7.6.0"]}, dataset="wikitext2", tokenizer=None, exllama_config={"version": 1}
    )
    assert torch.equal(load(packed)(tokens()).logits, logits)


def test_biases_that_only_the_file_has_are_added(tiny_model, tmp_path):
    packed, _ = write(tiny_model("llama"), tmp_path / "out", "auto_gptq", scheme="W4A16G32")
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.2.mlp.down_proj"
    tensors[f"{name}.bias"] = torch.linspace(-1, 1, 64).half()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    model = load(packed)
    inputs = torch.randn(3, 96)
    layer = model.get_submodule(name)
    expected = inputs @ layer.dequantized().t() + tensors[f"{name}.bias"].float()
    assert torch.allclose(layer(inputs), expected, atol=1e-5)
    assert_saves_in_auto_round_form(model, tmp_path / "saved")


@pytest.mark.parametrize("given", [{}, {"quantization_config": AutoRoundConfig()}], ids=["plain", "AutoRoundConfig()"])
@pytest.mark.parametrize(
    ("backend", "arguments"),
    [
        ("auto_round:gptq:exllamav2", {"scheme": "W4A16G32"}),
        ("auto_round:tritonv2", {"scheme": "W2A16G32", "sym": False}),
        ("auto_round:awq:gemm", {"scheme": "W4A16G32", "sym": False}),
    ],
    ids=["gptq", "triton", "awq"],
)
def test_files_of_auto_round_before_it_named_packings_load(backend, arguments, given, tiny_model, tmp_path):
    packed, fake = write(tiny_model("llama"), tmp_path / "out", "auto_round", **arguments)
    edit_config(packed, packing_format=None, quant_method="intel/auto-round", backend=backend)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, **given)
    rows = tokens()[:2]
    assert torch.equal(model(rows).logits, AutoModelForCausalLM.from_pretrained(fake, dtype=torch.float32)(rows).logits)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_compressed_tensors_of_mixed_bits_load(symmetric, tiny_model, tmp_path):
    """Written here by compressed-tensors' published layout: group_0 by class, group_1 by pattern, `ignore` beats both."""
    source, name = tiny_model("llama"), "model.layers.1.self_attn.q_proj"
    packed, fake = write(source, tmp_path / "out", "auto_round", scheme="W4A16G32", sym=symmetric, ignore_layers=["o_proj"],
                         layer_config={"k_proj": {"bits": 8}})  # fmt: skip
    ours = load(packed)
    tensors = load_file(packed / "model.safetensors")
    for path, layer in ours.named_modules():
        if isinstance(layer, PackedLinear):
            for leaf in layer.packed_names:
                del tensors[f"{path}.{leaf}"]
            fields = PackQuantized().pack(layer.quantized(), layer.spec, layer.in_features)
            tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in fields.items()}
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})

    def group(bits, targets):
        numbers = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
        return {"targets": targets, "weights": numbers, "format": "pack-quantized"}

    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group(4, ["Linear"]), "group_1": group(8, [r"re:.*k_proj$"])},
        "ignore": ["lm_head", r"re:.*o_proj$"],
    }
    (packed / "config.json").write_text(json.dumps(config))
    rows = tokens()[:2]
    model = load(packed)
    assert model.get_submodule(name).layout.name.startswith("gptq")
    assert torch.equal(model(rows).logits, AutoModelForCausalLM.from_pretrained(fake, dtype=torch.float32)(rows).logits)
    assert_saves_in_auto_round_form(model, tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "hqq"}, "quant_method 'hqq'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"format": "marlin-24"}}}, "'marlin-24'"),
    ],
    ids=["gemv", "hqq", "marlin", "5 bits", "marlin-24"],
)
def test_what_is_not_read_is_refused_with_a_sentence(changes, says, tiny_model, tmp_path):
    packed, _ = write(tiny_model("llama"), tmp_path / "out", "auto_gptq", scheme="W4A16G32")
    edit_config(packed, **changes)
    with pytest.raises(UnsupportedScheme, match=says):
        load(packed)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
    ],
    ids=["per tensor", "static"],
)
def test_a_float8_checkpoint_is_said_to_be_a_source(changes, tiny_model, tmp_path):
    packed, _ = write(tiny_model("llama"), tmp_path / "out", "auto_gptq", scheme="W4A16G32")
    edit_config(packed, **changes)
    with pytest.raises(UnsupportedScheme, match=r"is a source: quantize it from its files, with AutoRound\(\.\.\.\)"):
        load(packed)


@pytest.mark.parametrize("target", ["fp8", "llm_compressor"])
def test_another_scheme_is_not_made_of_a_float8_checkpoint_while_it_loads(target, tiny_model, tmp_path):
    packed, _ = write(tiny_model("llama_wide"), tmp_path / "out", target, scheme="FP8_BLOCK")
    with pytest.raises(UnsupportedScheme, match=r"holds FP8_BLOCK, and W4A16 is asked for: it is a source: quantize it"):
        load(packed, AutoRoundConfig(scheme="W4A16"))
    load(packed, AutoRoundConfig(scheme="FP8_BLOCK"))


def test_packed_layers_that_the_config_leaves_out_are_named(tiny_model, tmp_path):
    packed, _ = write(tiny_model("llama"), tmp_path / "out", "auto_gptq", scheme="W4A16G32")
    edit_config(packed, block_name_to_quantize="visual.blocks")
    with pytest.raises(UnsupportedLayer, match=r"holds model\.layers\.0\.mlp\.down_proj\.qweight, .* and 18 more"):
        load(packed)


def test_packed_layers_in_other_files_than_safetensors_are_refused(tiny_model, tmp_path):
    packed, _ = write(tiny_model("llama"), tmp_path / "out", "auto_gptq", scheme="W4A16G32")
    torch.save(load_file(packed / "model.safetensors"), packed / "pytorch_model.bin")
    (packed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no safetensors file.*convert it"):
        load(packed)
