# SPDX-License-Identifier: Apache-2.0
"""Calibration data in every form a user may have it."""

import json

import datasets
import pytest
import torch
from tiny import tokenizer

from hf_autoround.calibration.batches import calibration_set
from hf_autoround.errors import CalibrationError


def get(dataset, nsamples=4, seqlen=16, words=True, **arguments):
    return calibration_set(
        dataset, tokenizer() if words else None, nsamples=nsamples, seqlen=seqlen, vocabulary=128, longest=64, **arguments
    )


def text(count, start=3):
    return " ".join(f"w{3 + (start + place) % 120}" for place in range(count))


def test_short_texts_are_packed_not_dropped():
    data = get([text(7 - start % 2, start) for start in range(20)])
    assert data.tokens.shape == (4, 16)
    assert data.tokens[0, :8].tolist() == [*range(3, 10), 2], "a document, then the end-of-text token"
    assert "4 x 16 tokens of a list (9 documents)" in data.description


def test_one_long_text_is_cut_into_rows():
    ids = get([text(200)]).tokens
    assert ids.flatten().tolist() == [3 + (3 + place) % 120 for place in range(64)]


@pytest.mark.parametrize(
    "dataset",
    [
        torch.arange(3, 67).view(4, 16),
        [row.tolist() for row in torch.arange(3, 67).view(4, 16)],
        [row[None] for row in torch.arange(3, 67).view(4, 16)],
        [{"input_ids": row} for row in torch.arange(3, 67).view(4, 16)],
        datasets.Dataset.from_dict({"input_ids": torch.arange(3, 67).view(4, 16).tolist()}),
    ],
    ids=["tensor", "lists", "rows", "dicts", "Dataset"],
)
def test_rows_of_token_ids_are_taken_as_they_are(dataset):
    assert torch.equal(get(dataset, words=False).tokens, torch.arange(3, 67).view(4, 16))


def test_files(tmp_path):
    texts = [text(20, start) for start in range(5)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in texts))
    (tmp_path / "a.json").write_text(json.dumps([{"text": line} for line in texts]))
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    by_suffix = {suffix: get(str(tmp_path / f"a.{suffix}")) for suffix in ("txt", "jsonl", "json", "parquet")}
    assert all(data.tokens.shape == (4, 16) for data in by_suffix.values())
    assert torch.equal(by_suffix["jsonl"].tokens, by_suffix["json"].tokens)
    assert torch.equal(by_suffix["jsonl"].tokens, by_suffix["parquet"].tokens)
    assert "of a.txt (1 document)" in by_suffix["txt"].description, "a card says nothing of folders"


def test_pydoc_needs_no_network():
    data = get("pydoc", nsamples=2, seqlen=32)
    assert data.tokens.shape == (2, 32) and "of pydoc" in data.description


def test_fewer_tokens_than_asked_for_are_used_and_said():
    data = get([text(40)], nsamples=10)
    assert data.tokens.shape == (2, 16) and "10 were asked for, it has no more" in data.description
    assert get([text(9)], nsamples=10).tokens.shape == (1, 10)


def test_rows_are_not_longer_than_the_model_takes():
    data = get([text(300)], nsamples=2, seqlen=2048)
    assert data.tokens.shape == (2, 64) and "rows cut from 2048 to the model's 64 tokens" in data.description


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("missing.txt", "there is no calibration file missing.txt; pass a local text"),
        ("/nowhere/file.csv", "there is no calibration file"),
        (None, "NeelNanda/pile-10k cannot be fetched: the Hub is out of reach; pass a local text.*pydoc"),
        ("no/such-dataset", "out of reach|there is no dataset"),
        ([text(3)], "a list gives 4 tokens"),
        ([[3, 500] * 10], "holds token 500, the model knows 128: is it another tokenizer's"),
        ([{"body": "x"}], "keys body; one has to be text or input_ids"),
        ([3.5, 4.5], "neither a text nor a list of token ids|cannot be"),
        (42, "calibration data cannot be a int"),
        (datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), "columns a, b; one of them has to be called text"),
    ],
    ids=str,
)
def test_data_that_cannot_be_used(dataset, message):
    with pytest.raises(CalibrationError, match=message):
        get(dataset)


def test_texts_need_a_tokenizer():
    with pytest.raises(CalibrationError, match="need a tokenizer and the model folder has none"):
        get([text(100)], words=False)
