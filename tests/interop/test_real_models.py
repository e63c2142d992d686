# SPDX-License-Identifier: Apache-2.0
"""Real trained models, when they are there: rounding hurts, searching helps, tuning helps more."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_autoround import AutoRound
from hf_autoround.evaluation import perplexity

CASES = {
    "qwen3-wiki": ("wikitext-2-valid.txt", "wikitext-2-test.txt", 12),
    "opt-wiki": ("wikitext-2-valid.txt", "wikitext-2-test.txt", 12),
    "qwen3moe-wiki": ("wikitext-2-valid.txt", "wikitext-2-test.txt", 12),
    "tinystories": ("tinystories-calib.txt", "tinystories-test.txt", 48),
}


@pytest.mark.parametrize("name", CASES)
def test_tuning_beats_searching_beats_rounding(name, shared, tmp_path):
    calibration, test, windows = CASES[name]
    model = shared / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = (shared / "text" / test).read_text()[: windows * 256 * 8]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: windows * 256].view(-1, 256)
    scores = {"float": perplexity(AutoModelForCausalLM.from_pretrained(model, dtype="float32"), rows)}
    for method in ("rtn", "light"):
        AutoRound(
            str(model), scheme="W2A16G64", recipe=method, dataset=str(shared / "text" / calibration), nsamples=16, seqlen=256,
            batch_size=4, disable_tqdm=True,
        ).quantize_and_save(tmp_path / method)  # fmt: skip
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / method, dtype="float32")
        scores[method] = perplexity(packed, rows)
    assert scores["float"] < scores["light"] < scores["rtn"]
    inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
    assert packed.generate(**inputs, max_new_tokens=5, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
