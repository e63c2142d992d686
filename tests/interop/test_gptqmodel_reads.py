# SPDX-License-Identifier: Apache-2.0
"""gptqmodel, and transformers through it, read `auto_gptq` and `auto_awq` checkpoints with the weights that we quantized.

Runs under `make test-gptqmodel`, or where it is installed; its kernel for all but 4 bits compiles itself.
"""

import pytest
import torch
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound

gptqmodel = pytest.importorskip("gptqmodel")
pytest.importorskip("optimum")

# what the kernels round: the one for 4 bits multiplies in bfloat16, the other makes float16 weights, which hold a code of
# two bits times a scale exactly
EXACT, FLOAT16, BF16 = 1e-6, 1e-3, 1e-2
CASES = {
    "W2": ("auto_gptq", {"scheme": "W2A16G32"}, EXACT),
    "W3": ("auto_gptq", {"scheme": "W3A16G32"}, FLOAT16),
    "W8": ("auto_gptq", {"scheme": "W8A16G32"}, FLOAT16),
    "W4": ("auto_gptq", {"scheme": "W4A16G32"}, BF16),
    "W2-asym": ("auto_gptq", {"scheme": "W2A16G32", "sym": False}, EXACT),
    "W3-asym": ("auto_gptq", {"scheme": "W3A16G32", "sym": False}, FLOAT16),
    "W4-asym": ("auto_gptq", {"scheme": "W4A16G32", "sym": False}, BF16),
    "W3 and 16 bits": ("auto_gptq", {"scheme": "W3A16G32", "ignore_layers": ["layers.1.mlp", "k_proj"]}, FLOAT16),
    "awq": ("auto_awq", {"scheme": "W4A16G32"}, BF16),
    "awq-asym": ("auto_awq", {"scheme": "W4A16G32", "sym": False}, BF16),
    "awq and 16 bits": ("auto_awq", {"scheme": "W4A16G32", "sym": False, "ignore_layers": ["layers.1.mlp.down_proj"]}, BF16),
}


def logits(model):
    return model(tokens()[:2]).logits.float()


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def written(tiny_model, folder, target, arguments):
    AutoRound(str(tiny_model("llama")), recipe="rtn", disable_tqdm=True, **arguments).quantize_and_save(folder, f"{target},fake")
    fake = AutoModelForCausalLM.from_pretrained(folder / "fake", dtype=torch.float32)
    return folder / target, logits(fake)


@pytest.mark.parametrize("case", CASES)
def test_transformers_own_path_computes_what_was_quantized(case, tiny_model, tmp_path):
    target, arguments, tolerance = CASES[case]
    folder, expected = written(tiny_model, tmp_path, target, arguments)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
    assert "gptqmodel" in kinds and "hf_autoround" not in kinds
    error = relative(logits(model), expected)
    print(f"{case}: {error:.1e}")
    assert error < tolerance


MIXED = {
    "auto_gptq": {
        "scheme": "W4A16G32",
        "layer_config": {"o_proj": {"bits": 8}, "layers.1.mlp.down_proj": {"bits": 3}, "[qkv]_proj": {"bits": 2}},
        "ignore_layers": ["layers.0.mlp"],
    },
    "auto_gptq-asym": {"scheme": "W4A16G32", "layer_config": {"o_proj": {"bits": 8, "sym": False}}},
    "auto_awq": {"scheme": "W4A16G32", "sym": False, "ignore_layers": ["layers.1.mlp"]},
}


@pytest.mark.parametrize("case", MIXED)
def test_gptqmodel_itself_reads_mixed_schemes(case, tiny_model, tmp_path):
    folder, expected = written(tiny_model, tmp_path, case.partition("-")[0], MIXED[case])
    loaded = gptqmodel.GPTQModel.load(str(folder), device="cpu", dtype=torch.bfloat16, backend=gptqmodel.BACKEND.TORCH)
    error = relative(logits(loaded.model), expected)
    print(f"{case}: {error:.1e}")
    assert error < 3 * BF16  # the whole model is in bfloat16 here
