# SPDX-License-Identifier: Apache-2.0
"""Laws of every format: what is written loads and computes what was quantized; what cannot be is refused beforehand."""

import json

import pytest
import torch
from inputs import logits_on_quantized_inputs
from safetensors.torch import load_file
from tiny import CONFIGS, tokens
from transformers import AutoModel, AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.cli.list_registries import formats
from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats import FORMATS
from hf_autoround.formats.auto_round import read_auto_round_config
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layers.sites import WeightSite
from hf_autoround.numerics import refuse_scheme
from hf_autoround.scheme import PRESETS, integer_scheme, resolve_scheme

SITE = WeightSite("layer", "layer.weight", (4096, 4096))
CELLS = [
    (target, scheme, sym)
    for target in FORMATS
    for scheme in PRESETS
    if scheme.weight is not None
    for sym in (True, False)
    if target.refuse(SITE, asked := resolve_scheme(scheme, sym=sym)) is None and refuse_scheme(asked) is None
]


def cell(value):
    return value.name if hasattr(value, "name") else "sym" if value else "asym"


def quantize(model, folder, **arguments):
    defaults = {"recipe": "rtn", "disable_tqdm": True}
    AutoRound(str(model), **{**defaults, **arguments}).quantize_and_save(folder, arguments.pop("format", "auto_round"))
    return folder


def load(folder, **arguments):
    """Load with our backends: a checkpoint of another method only comes to us when it is asked for."""
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        arguments["quantization_config"] = AutoRoundConfig()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)


@pytest.mark.parametrize(("target", "scheme", "sym"), CELLS, ids=cell)
def test_written_and_read_back_it_computes_what_was_quantized(target, scheme, sym, tiny_model, tmp_path):
    model = tiny_model("llama_wide")
    AutoRound(str(model), scheme=scheme.name, sym=sym, recipe="rtn", dataset=tokens(), disable_tqdm=True).quantize_and_save(
        tmp_path / "out", f"{target.name},fake" if target.name != "fake" else "fake"
    )
    folders = [tmp_path / "out" / target.name, tmp_path / "out" / "fake"] if target.name != "fake" else [tmp_path / "out"] * 2
    rows = tokens()[:2]
    packed, fake = (load(folder) for folder in folders)
    assert target.name == "fake" or sum(isinstance(module, PackedLinear) for module in packed.modules()) == 21
    logits = packed(rows).logits
    assert torch.equal(logits, logits_on_quantized_inputs(fake, packed, rows))
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(rows).logits
    error = ((logits - exact).norm() / exact.norm()).item()
    both = 1.5 if scheme.activation is not None and scheme.weight.bits == 4 else 1.0  # inputs of 4 bits as well
    assert 0 < error < both * {2: 1.5, 3: 0.8, 4: 0.4}.get(scheme.weight.bits, 0.2)


def test_every_cell_that_is_printed_is_tested_above():
    lines = [line.split() for line in formats().split("\n\n")[1].splitlines()]
    printed = {(target, name, cell) for name, *cells in lines[1:] for target, cell in zip(lines[0][1:], cells, strict=True)}
    symmetric, asymmetric = (
        {(target.name, scheme.name) for target, scheme, kind in CELLS if kind is sym} for sym in (True, False)
    )
    assert symmetric == {(target, name) for target, name, cell in printed if cell != "-"}
    assert not asymmetric & {(target, name) for target, name, cell in printed if cell != "yes"}
    assert {name for _, name, _ in printed} == {scheme.name for scheme in PRESETS if scheme.weight is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_written_loaded_saved_and_loaded_again(name, tiny_model, tmp_path):
    model = tiny_model(name)
    formats = "auto_round" if name == "gpt_oss" else "auto_round,fake"  # its experts are one tensor on disk: fake refuses
    AutoRound(str(model), scheme="W4A16", group_size=32, recipe="rtn", disable_tqdm=True).quantize_and_save(
        tmp_path / "out", formats
    )
    folder = tmp_path / "out" if name == "gpt_oss" else tmp_path / "out" / "auto_round"
    rows = tokens()[:2]
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    logits = loaded(rows).logits
    if name != "gpt_oss":
        fake = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "fake", dtype=torch.float32)
        assert torch.equal(fake(rows).logits, logits)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(rows).logits, logits)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    torch.testing.assert_close(loaded.dequantize()(rows).logits, logits, rtol=0, atol=1e-5)  # experts may run batched then


@pytest.mark.parametrize(
    ("scheme", "target"), [("INT8", "llm_compressor"), ("MXFP8", "auto_round"), ("W4A16G32", "auto_round:mlx")]
)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_packed_experts_are_not_merged_where_their_codes_are_called_weight(name, scheme, target, tiny_model, tmp_path):
    AutoRound(str(tiny_model(name)), scheme=scheme, recipe="rtn", disable_tqdm=True).quantize_and_save(
        tmp_path / "out", f"{target},fake"
    )
    rows, folder = tokens()[:2], tmp_path / "out" / target
    packed, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    fake = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "fake", dtype=torch.float32, experts_implementation="eager")
    logits = packed(rows).logits
    assert torch.equal(logits, logits_on_quantized_inputs(fake, packed, rows))
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(rows).logits, logits)


@pytest.mark.parametrize(("scheme", "target"), [("W4A16G32", "auto_round"), ("INT8", "llm_compressor")])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral"])
def test_the_base_model_alone_is_loaded_packed(name, scheme, target, tiny_model, tmp_path):
    folder = quantize(tiny_model(name), tmp_path / "out", scheme=scheme, format=target)
    whole = load(folder)
    base, report = AutoModel.from_pretrained(
        folder, dtype=torch.float32, quantization_config=AutoRoundConfig(), output_loading_info=True
    )
    assert not report["missing_keys"] and report["unexpected_keys"] == {"lm_head.weight"}
    rows = tokens()[:2]
    assert torch.equal(whole.lm_head(base(rows).last_hidden_state), whole(rows).logits)


def test_several_formats_share_one_run_and_equal_single_ones(tiny_model, tmp_path):
    arguments = {"scheme": "W3A16", "group_size": 32, "iters": 3, "dataset": tokens(), "disable_tqdm": True}
    AutoRound(str(tiny_model("llama")), **arguments).quantize_and_save(tmp_path / "both", "auto_round,fake")
    AutoRound(str(tiny_model("llama")), **arguments).quantize_and_save(tmp_path / "one")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "both" / "auto_round" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_the_config_says_what_the_file_holds(tiny_model, tmp_path):
    folder = quantize(
        tiny_model("qwen3_moe"),
        tmp_path / "out",
        scheme="W4A16",
        group_size=32,
        layer_config={"o_proj": {"bits": 8}, r"layers\.0\.mlp": "W2A16G32"},
        ignore_layers=["layers.2.self_attn.k_proj"],
    )
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "packing_format", "bits", "group_size", "sym", "data_type")} == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
    }
    assert "backend" not in config and config["block_name_to_quantize"] == "model.layers"
    kept = {name for name, scheme in config["extra_config"].items() if scheme["bits"] == 16}
    assert all(scheme.keys() == {"bits", "group_size", "sym", "data_type"} for scheme in config["extra_config"].values())
    assert kept == {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate", "model.layers.2.self_attn.k_proj"}
    stored = read_auto_round_config(config)
    tensors = load_file(folder / "model.safetensors")
    packed = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert len(packed) == 3 * 4 - 1 + 3 + 2 * 4 * 3
    for name in packed:
        scheme = stored.scheme_of(name, inside_blocks=True)
        expected = 8 if "o_proj" in name else 2 if "layers.0.mlp" in name else 4
        assert scheme == integer_scheme(expected, 32)
    for name in kept:
        assert stored.scheme_of(name, inside_blocks=name != "lm_head") is None and f"{name}.weight" in tensors


@pytest.mark.parametrize(("arguments", "packing"), [({}, "auto_round:auto_awq"), ({"bits": 3}, "auto_round")])
def test_asymmetric_layouts(arguments, packing, tiny_model, tmp_path):
    folder = quantize(tiny_model("llama"), tmp_path / "out", scheme="W4A16", group_size=32, sym=False, **arguments)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["packing_format"] == packing


def test_large_models_are_written_in_shards(tiny_model, tmp_path):
    whole = quantize(tiny_model("llama"), tmp_path / "whole", group_size=32)
    parts = quantize(tiny_model("llama"), tmp_path / "parts", group_size=32, max_shard_size="30KB")
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 60_000 for path in files)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    merged = {name: tensor for path in files for name, tensor in load_file(path).items()}
    expected = load_file(whole / "model.safetensors")
    assert merged.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    AutoModelForCausalLM.from_pretrained(parts)


def test_what_a_format_cannot_store_is_kept_and_listed_or_refused_when_named(tiny_model, tmp_path):
    folder = tmp_path / "out"
    quantize(tiny_model("qwen3_moe"), folder, group_size=32)  # its routers have four rows
    model = tiny_model("llama")
    with pytest.raises(UnsupportedScheme, match=r"fake cannot store .*one tensor"):
        AutoRound(
            str(tiny_model("gpt_oss")), recipe="rtn", group_size=32, layer_config={"experts": {"bits": 8}}, disable_tqdm=True
        ).quantize_and_save(tmp_path / "no", "auto_round,fake")
    assert not (tmp_path / "no").exists() and model.exists()
