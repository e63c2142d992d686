# SPDX-License-Identifier: Apache-2.0
"""mlx-lm, which runs on Linux too, reads `mlx` checkpoints and computes what our loader computes.

Runs under `make test-mlx`, which makes mlx-lm's environment, or where mlx_lm can be imported.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import tokens
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config

from hf_autoround import AutoRound

ENVIRONMENT = os.environ.get("MLX_ENVIRONMENT")
pytestmark = pytest.mark.skipif(ENVIRONMENT is None and find_spec("mlx_lm") is None, reason="make test-mlx runs this")


def computed_by_mlx(folder, rows, dtype="float32"):
    """Return mlx-lm's logits, and the dtype in which it came to them."""
    python = Path(ENVIRONMENT) / "bin" / "python" if ENVIRONMENT else sys.executable
    script = Path(__file__).parent / "mlx" / "logits.py"
    done = subprocess.run(
        [python, script, folder, dtype, json.dumps(rows.tolist())],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return torch.tensor(answer["logits"]), answer["dtype"].removeprefix("mlx.core.")


def computed_by_us(folder, rows, dtype=torch.float32):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(rows).logits.float()


def write(source, folder, **arguments):
    AutoRound(str(source), recipe="rtn", disable_tqdm=True, **arguments).quantize_and_save(folder, "mlx")
    return folder


def assert_same(folder, length=24):
    rows = tokens()[:2, :length]
    found, expected = computed_by_mlx(folder, rows)[0], computed_by_us(folder, rows)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def save(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)  # so that positions matter
    model.save_pretrained(folder)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width_and_group_size(bits, size, tiny_model, tmp_path):
    assert_same(write(tiny_model("llama_wide"), tmp_path / "out", scheme=f"W{bits}A16", group_size=size))


_SIZES = dict(
    hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
OTHERS = {  # whose settings transformers 5 names otherwise
    "qwen2": Qwen2Config(**_SIZES, rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    "llama, linear": LlamaConfig(**_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}),
    "llama, llama3": LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "gpt_neox": GPTNeoXConfig(
        **_SIZES, hidden_act="gelu_pytorch_tanh",  # mlx-lm has no other
        rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
    "gemma3, 7 layers": Gemma3TextConfig(
        **{**_SIZES, "num_hidden_layers": 7, "tie_word_embeddings": True}, head_dim=16, sliding_window=8, query_pre_attn_scalar=16
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gemma2", "phi3", "qwen3_moe", "mixtral", *OTHERS])
def test_every_architecture(name, tiny_model, tmp_path):
    source = tmp_path / "source" if name in OTHERS else tiny_model(name)
    if name in OTHERS:
        save(OTHERS[name], source)
    # mlx-lm's gemma2 has no sliding window
    assert_same(write(source, tmp_path / "out", scheme="W4A16G32"), 8 if name == "gemma2" else 24)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_of_many_kinds(name, tiny_model, tmp_path):
    arguments = {"layer_config": {r"layers\.1\..*experts": "W8A16G32"}, "ignore_layers": ["layers.0.mlp"]}
    assert_same(write(tiny_model(name), tmp_path / "out", scheme="W3A16", group_size=32, **arguments))


def test_layers_of_many_kinds(tiny_model, tmp_path):
    kinds = {"k_proj": "W2A16G32", "up_proj": "W5A16G64", "layers.0.mlp.down_proj": "W8A16", "lm_head": "W6A16"}
    arguments = {"scheme": "W4A16", "layer_config": kinds, "ignore_layers": ["layers.1.self_attn.o_proj"]}
    assert_same(write(tiny_model("llama_wide"), tmp_path / "out", **arguments))


@pytest.mark.parametrize("name", ["llama_w4_mlx", "llama_w5_mlx"])
def test_what_auto_round_wrote_is_read_alike(name, shared):
    assert_same(next((shared / "golden" / name).rglob("config.json")).parent)
