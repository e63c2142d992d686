# SPDX-License-Identifier: Apache-2.0
"""A cache with room for all tokens holds what transformers' own holds."""

import pytest
import torch
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround.models.cache import room_for


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "opt", "qwen3_moe"])
def test_generation_goes_the_same_way(name, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name))
    begun = tokens()[:3, :5]
    settings = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(begun, attention_mask=torch.ones_like(begun), **settings)
    given = room_for(model, begun.shape[1] + 14)
    roomy = model.generate(begun, attention_mask=torch.ones_like(begun), **settings, **given)
    assert torch.equal(roomy.sequences, plain.sequences)
    for mine, theirs in zip(roomy.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, theirs)
    (cache,) = given.values()
    assert cache.get_seq_length() == roomy.sequences.shape[1] - 1


def test_tokens_so_far_are_views_of_the_room(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    (cache,) = room_for(model, 12).values()
    states = torch.randn(2, 2, 5, 4)
    before, _ = cache.update(states, states, 0)
    after, values = cache.update(states[:, :, :1], 2 * states[:, :, :1], 0)
    assert after.data_ptr() == before.data_ptr() and after.shape[2] == 6
    assert torch.equal(after[:, :, :5], states) and torch.equal(values[:, :, 5:], 2 * states[:, :, :1])
