# SPDX-License-Identifier: Apache-2.0
"""AWQ configurations: one scheme, layers in 16 bits by name, and other tools' spellings."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats import read_config
from hf_autoround.scheme import BF16, integer_scheme

BASE = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
Q, GATE, ROUTER = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.gate"))


def write(model, folder, **arguments):
    AutoRound(str(model), recipe="rtn", disable_tqdm=True, **arguments).quantize_and_save(folder, "auto_awq")


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_layers_in_16_bits_are_listed_and_loaded(sym, tiny_model, tmp_path):
    write(tiny_model("qwen3_moe"), tmp_path / "out", scheme="W4A16G32", sym=sym, ignore_layers=["o_proj"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["zero_point"] is not sym and config["version"] == "gemm"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = {f"model.layers.{block}.self_attn.o_proj" for block in range(3)} | {
        f"model.layers.{block}.mlp.gate" for block in (1, 2)
    }
    assert set(config["modules_to_not_convert"]) == kept | {"lm_head"}
    assert all(f"{name}.weight" in tensors for name in kept)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=AutoRoundConfig(), output_loading_info=True
    )
    assert not any(report.values()), report
    logits = model(tokens()[:2]).logits
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved["packing_format"] == "auto_round:auto_awq" and saved["sym"] is sym
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(tokens()[:2]).logits, logits)


def test_mixed_schemes_are_refused_before_work_starts(tiny_model, tmp_path):
    with pytest.raises(UnsupportedScheme, match=r"auto_awq cannot store this: it stores one scheme .*q_proj has W4A16G32"):
        write(tiny_model("llama"), tmp_path / "out", scheme="W4A16G64", layer_config={"q_proj": {"group_size": 32}})
    with pytest.raises(UnsupportedScheme, match="it stores 4 bits, not 8"):
        write(tiny_model("llama"), tmp_path / "out", scheme="W4A16G32", layer_config={"q_proj": {"bits": 8}})
    assert not (tmp_path / "out").exists()
    tuned = AutoRound(str(tiny_model("llama")), scheme="W4A16G64", recipe="rtn", layer_config={"q_proj": {"group_size": 32}})
    tuned.quantize()
    with pytest.raises(UnsupportedScheme, match="it stores one scheme for all layers"):
        tuned.save_quantized(tmp_path / "out", "auto_awq")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {Q: integer_scheme(4, sym=False)}),
        ({"zero_point": False, "group_size": 64}, {Q: integer_scheme(4, 64)}),
        ({"version": "GEMM"}, {Q: integer_scheme(4, sym=False)}),
        ({"modules_to_not_convert": ["gate", "lm_head"]}, {GATE: integer_scheme(4, sym=False), ROUTER: BF16}),
        ({"modules_to_not_convert": ["model.layers.1"]}, {Q: BF16, Q.replace("1", "11"): integer_scheme(4, sym=False)}),
        ({"modules_to_not_convert": None, "lm_head": True}, {"lm_head": integer_scheme(4, sym=False)}),
    ],
)
def test_others_configurations_are_read_as_they_mean_them(more, expected):
    stored = read_config({**BASE, **more})
    for name, scheme in expected.items():
        chosen = stored.scheme_of(name, inside_blocks=name != "lm_head")
        assert chosen == (None if scheme == BF16 else scheme), name


def load_renamed(model, folder, **more):
    """Load an AWQ checkpoint whose configuration is in the words of the first AWQ tool."""
    write(model, folder, scheme="W4A16G32", sym=False)
    config = json.loads((folder / "config.json").read_text())
    own = config["quantization_config"]
    own |= {"w_bit": own.pop("bits"), "q_group_size": own.pop("group_size"), **more}
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=AutoRoundConfig())


def test_the_first_awq_tools_spelling_is_read(tiny_model, tmp_path):
    model = load_renamed(tiny_model("llama"), tmp_path / "out")
    assert model.model.layers[1].self_attn.q_proj.scheme == integer_scheme(4, 32, False)


def test_the_first_awq_tools_own_layout_is_refused(tiny_model, tmp_path):
    with pytest.raises(UnsupportedScheme, match="version 'llm-awq'"):
        load_renamed(tiny_model("llama"), tmp_path / "out", backend="llm-awq")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"version": "gemv"}, "version 'gemv' is not supported; there is gemm"),
        ({"version": "marlin"}, "version 'marlin'"),
        ({"backend": "llm-awq"}, "version 'llm-awq'"),
        ({"bits": 8}, "layers of 8 bits"),
        ({"dynamic": {"+:.*": {"bits": 3}}}, "layers of 3 bits"),
        ({"modules_to_not_convert": ["("]}, "is no regular expression"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(more, why):
    with pytest.raises(UnsupportedScheme, match=why):
        read_config({**BASE, **more})
