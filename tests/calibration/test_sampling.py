# SPDX-License-Identifier: Apache-2.0
"""Text sampled from the model: a function of the seed, distributed as the model says, and nothing else is touched."""

import pytest
import torch
from tiny import CONFIGS, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_autoround.calibration import sampling
from hf_autoround.calibration.batches import SampledText
from hf_autoround.calibration.sampling import refuse_sampling, sample_text
from hf_autoround.errors import CalibrationError
from hf_autoround.models.blocks import model_parts
from hf_autoround.models.loading import open_model
from hf_autoround.models.placement import Placement, resolve_placement

CPU = Placement(torch.device("cpu"))
NONE = torch.empty((0, 16), dtype=torch.int64)


def sample(model, prompts=NONE, placement=CPU, **request):
    lazy = open_model(model)
    parts = model_parts(lazy.model)
    request = {"num": 8, "seqlen": 16, "seed": 3, "start": 1, **request}
    rows = sample_text(lazy, parts, SampledText(**request), prompts, placement)
    assert all(parameter.device.type == "meta" for parameter in lazy.model.parameters()), "weights were left in memory"
    return rows


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_writes_whole_rows(name, tiny_model):
    rows = sample(tiny_model(name))
    assert rows.shape == (8, 16) and rows.dtype == torch.int64 and rows.device.type == "cpu"
    assert int(rows.min()) >= 0 and int(rows.max()) < 128
    assert (rows[:, 0] == 1).all() and len(rows[:, 1:].unique()) > 8


@pytest.mark.parametrize("name", CONFIGS)
def test_cold_text_is_what_greedy_search_writes(name, tiny_model):
    data = tokens(4, 16)
    data[:, 0] = 1
    rows = sample(tiny_model(name), prompts=data, num=4, temperature=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name))
    begun = rows[:, :5]
    expected = model.generate(
        begun, attention_mask=torch.ones_like(begun), max_new_tokens=11, do_sample=False, suppress_tokens=[2]
    )
    assert torch.equal(rows, expected)


def test_the_seed_decides_and_nobodys_random_state_is_touched(tiny_model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (sample(tiny_model("llama"), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_batches_do_not_show(tiny_model, monkeypatch):
    whole = sample(tiny_model("llama"), num=10)
    monkeypatch.setattr(sampling, "_ROWS", 3)
    assert torch.equal(sample(tiny_model("llama"), num=10), whole)
    monkeypatch.setattr(sampling, "_CACHE", 1)
    assert torch.equal(sample(tiny_model("llama"), num=10), whole)


def test_several_devices_write_the_same(tiny_model):
    spread = resolve_placement({"q_proj": "cpu"})
    assert torch.equal(sample(tiny_model("llama"), placement=spread), sample(tiny_model("llama")))


@pytest.mark.parametrize(("data", "temperature"), [(True, 1.0), (True, 2.0), (False, 1.0)], ids=["as it is", "hot", "beginning"])
def test_tokens_come_as_often_as_the_model_says(data, temperature, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    prompts = tokens(1, 16) if data else NONE
    rows = sample(tiny_model("llama"), prompts=prompts, num=4000, seqlen=8, temperature=temperature)
    begun = 5 if data else 1
    logits = model(rows[:1, :begun]).logits[0, -1]
    logits[2] = float("-inf")  # no text ends
    expected = (logits / (temperature if data else 2 * temperature)).softmax(-1).double()
    found = torch.bincount(rows[:, begun], minlength=128) / 4000
    deviation = (found - expected).abs() / (expected * (1 - expected) / 4000).sqrt().clamp(min=1e-3)
    assert deviation.max() < 5 and expected.max() < 0.9 and (found > 0).sum() > 8


def test_rows_begin_with_rows_of_the_data(tiny_model):
    data = tokens(16, 24)
    data[::2, 0] = 1  # some of them begin a text
    rows = sample(tiny_model("llama"), prompts=data, num=16)
    beginnings = {tuple(row[1:5].tolist()) if row[0] == 1 else tuple(row[:4].tolist()) for row in data}
    assert (rows[:, 0] == 1).all()
    assert {tuple(row[1:5].tolist()) for row in rows} == beginnings, "each row of the data once"
    more = sample(tiny_model("llama"), prompts=data[:3], num=16)
    assert len({tuple(row[:5].tolist()) for row in more}) == 3 and len(more.unique(dim=0)) == 16


def test_no_text_ends(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    often = sample(model, num=64, seqlen=64).unique(return_counts=True)
    ends = [token for token, count in zip(*map(Tensor.tolist, often), strict=True) if count > 40][:3]
    assert len(ends) == 3
    model.config.eos_token_id = [*ends, 500]
    assert not torch.isin(sample(model, num=64, seqlen=64)[:, 1:], torch.tensor(ends)).any()


@pytest.mark.parametrize(
    ("config", "first"),
    [({"bos_token_id": 7}, {7}), ({"bos_token_id": None}, {2}), ({"bos_token_id": None, "eos_token_id": [5, 6]}, {5})],
    ids=["begin", "end", "ends"],
)
def test_without_a_tokenizer_the_configuration_says_how_a_text_begins(config, first, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    for key, value in config.items():
        setattr(model.config, key, value)
    assert set(sample(model, start=None)[:, 0].tolist()) == first


def test_a_model_that_begins_with_nothing_begins_at_random(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.config.bos_token_id = model.config.eos_token_id = None
    assert len(sample(model, start=None, num=20)[:, 0].unique()) > 10


def test_the_generation_configuration_counts(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.config.bos_token_id = model.config.eos_token_id = None
    model.generation_config.bos_token_id, model.generation_config.repetition_penalty = 9, 1.5
    model.save_pretrained(tmp_path)
    assert set(sample(tmp_path, start=None)[:, 0].tolist()) == {9}


def test_a_model_too_large_for_memory_is_refused(tiny_model, monkeypatch):
    lazy = open_model(tiny_model("llama"))
    assert refuse_sampling(lazy, 16, CPU) is None
    monkeypatch.setattr(sampling, "get_max_memory", lambda: {"cpu": 100_000})
    assert "the whole model has to be in memory for that: it needs 0.0 GB" in refuse_sampling(lazy, 16, CPU)


def test_damaged_weights_are_noticed(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="predictions hold NaN"):
        sample(model)
