# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors reads what format llm_compressor writes: its own unpackers give our weights, its model our logits.

`make test-compressed-tensors` runs this with the pairs of versions below. transformers 5.19 with compressed-tensors 0.18 or newer
loads everything; what the other pairs cannot load, they refuse, and the tests say so:
* compressed-tensors 0.17 expects 32 / b whole codes in a word, which only 2, 4 and 8 bits have, and takes no
  blocks one above the other;
* transformers 5.23 compares shapes, and compressed-tensors from 0.18 on does not tell it those of packed zero points.
"""

import json
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.formats import FORMATS
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layers.sites import WeightSite
from hf_autoround.registry import find
from hf_autoround.scheme import PRESETS, resolve_scheme

pytest.importorskip("compressed_tensors")

OLD = Version(version("compressed-tensors")) < Version("0.18")
SITE = WeightSite("layer", "layer.weight", (256, 256))
TARGET = find(FORMATS, "llm_compressor", kind="format")
STORED = [
    preset for preset in PRESETS if preset.weight and TARGET.refuse(SITE, preset) is None and preset.weight.group_size != 64
]
STORED += [resolve_scheme("W4A16", sym=False), resolve_scheme("W3A16G32", sym=False), resolve_scheme("W8A16", group_size=-1)]
STORED += [resolve_scheme("W8A16G32", sym=False, act_bits=8, act_group_size=-1)]
MIXED = {"q_proj": "MXFP4", "k_proj": "MXFP4", "v_proj": "MXFP4", "down_proj": "FP8_BLOCK", "o_proj": {"bits": 16}}


def cannot_load(scheme):
    """Return what the installed pair of versions ends with for a scheme, or None."""
    weight = scheme.weight
    if OLD and weight.data_type == "int" and 32 % weight.bits:
        return "must match the size|mismatched|mat1 and mat2"
    if OLD and scheme.name == "FP8_BLOCK":
        return "must match the size"
    if not OLD and Version(version("transformers")) >= Version("5.23") and not weight.symmetric:
        return "ignore_mismatched_sizes"
    return None


def write(model, folder, scheme, **arguments):
    options = {"recipe": "rtn", "dataset": tokens(), "disable_tqdm": True}
    AutoRound(str(model), scheme=scheme, **options, **arguments).quantize_and_save(folder, "llm_compressor")
    return folder


def ours(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=AutoRoundConfig(backend="torch"))


def assert_weights_are_unpacked(folder):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = load_file(folder / "model.safetensors")
    groups = {}
    for group in config["config_groups"].values():
        for name in group["targets"]:
            groups[name] = group
    for path, layer in ours(folder, torch.float32).named_modules():
        if isinstance(layer, PackedLinear):
            group = groups.get(path) or groups["Linear"]
            tensors = {name.removeprefix(f"{path}."): tensor for name, tensor in stored.items() if name.startswith(f"{path}.")}
            scheme = QuantizationScheme(**{key: group[key] for key in ("targets", "weights", "input_activations")})
            unpacked = BaseCompressor.get_value_from_registry(group["format"]).decompress(tensors, scheme)["weight"]
            torch.testing.assert_close(unpacked.float(), layer.dequantized(), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", STORED, ids=lambda scheme: scheme.name)
def test_it_unpacks_our_weights_and_computes_our_logits(scheme, tiny_model, tmp_path):
    floats = scheme.weight.data_type in ("mx_fp", "nv_fp")  # it multiplies these in bfloat16 only
    dtype = torch.bfloat16 if floats else torch.float32
    folder = write(tiny_model("llama_wide", torch.bfloat16), tmp_path / "out", scheme)
    rows = tokens()[:2]
    refusal = cannot_load(scheme)
    if refusal is not None:
        with pytest.raises(RuntimeError, match=refusal):
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(rows)
        return
    assert_weights_are_unpacked(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        expected, logits = ours(folder, dtype)(rows).logits.float(), theirs(rows).logits.float()
    error = (logits - expected).norm() / expected.norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 2e-3), error


def test_it_reads_mixed_schemes(tiny_model, tmp_path):
    folder = write(tiny_model("llama_wide"), tmp_path / "out", "W4A16G32", layer_config=MIXED)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert [name for name in config["ignore"] if "o_proj" in name] and "lm_head" in config["ignore"]
    assert_weights_are_unpacked(folder)
    rows = tokens()[:2]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, logits = ours(folder, torch.bfloat16)(rows).logits.float(), theirs(rows).logits.float()
    assert (logits - expected).norm() / expected.norm() < 0.03
