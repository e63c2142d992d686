# SPDX-License-Identifier: Apache-2.0
"""The dataset string: sources with options, joined by commas."""

import json

import pytest
import torch
from tiny import tokenizer

from hf_autoround.calibration.batches import calibration_set
from hf_autoround.calibration.spec import SourceSpec, parse_dataset
from hf_autoround.errors import CalibrationError


def get(dataset, nsamples=4, seqlen=16, words=True, **arguments):
    return calibration_set(
        dataset, tokenizer() if words else None, nsamples=nsamples, seqlen=seqlen, vocabulary=128, longest=64, **arguments
    )


def text(count, start=3):
    return " ".join(f"w{3 + (start + place) % 120}" for place in range(count))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with two texts and a data set of two splits."""
    (tmp_path / "a.txt").write_text(text(300))
    (tmp_path / "b.txt").write_text(text(300, 50))
    (tmp_path / "corpus").mkdir()
    for split, start in (("train", 0), ("test", 70)):
        (tmp_path / "corpus" / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text(16, start)}) for _ in range(8)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("dataset", "sources"),
    [
        ("NeelNanda/pile-10k", [SourceSpec("NeelNanda/pile-10k")]),
        ("pydoc:num=3", [SourceSpec("pydoc", num=3)]),
        ("a/b:split=train+test:num=8, self", [SourceSpec("a/b", num=8, split="train+test"), SourceSpec("self")]),
        ("self:num=4:seed=7:temperature=1.3", [SourceSpec("self", num=4, seed=7, temperature=1.3)]),
        (r"C:\texts\a.txt:num=2", [SourceSpec(r"C:\texts\a.txt", num=2)]),
        ("here:a.txt", [SourceSpec("here:a.txt")]),
    ],
    ids=str,
)
def test_a_string_names_sources_with_options(dataset, sources):
    assert parse_dataset(dataset) == sources


@pytest.mark.parametrize("name", ["a,b.txt", "a:num=3.txt", "x:y,self:num=2"])
def test_an_existing_file_is_that_file(name, folder):
    (folder / name).write_text(text(100))
    assert torch.equal(get(name).tokens, get([text(100)]).tokens) and get(name).sampled is None


def test_one_source_with_a_number_gives_what_nsamples_gives(folder):
    assert torch.equal(get("a.txt:num=9").tokens, get("a.txt", nsamples=9).tokens)


def test_sources_are_joined_in_order(folder):
    data = get("b.txt:num=3,a.txt:num=5")
    assert torch.equal(data.tokens, torch.cat([get("b.txt", 3).tokens, get("a.txt", 5).tokens]))
    assert data.description == "3 x 16 tokens of b.txt (1 document) and 5 x 16 tokens of a.txt (1 document)"
    assert data.digest != get("a.txt:num=5,b.txt:num=3").digest


def test_those_without_a_number_share_nsamples(folder):
    data = get("a.txt,b.txt:num=2,pydoc,self", nsamples=11)
    assert [len(get(name, count).tokens) for name, count in (("a.txt", 4), ("b.txt", 2), ("pydoc", 4))] == [4, 2, 4]
    assert len(data.tokens) == 10 and data.sampled.num == 3 and data.samples == 13
    assert torch.equal(data.tokens[4:6], get("b.txt", 2).tokens)


def test_a_source_that_has_less_is_named(folder):
    (folder / "short.txt").write_text(text(40))
    assert get("a.txt:num=1,short.txt:num=9").description.endswith("; 9 were asked for of short.txt, it has no more")


def test_splits_are_chosen_and_added(folder):
    train, test = get("corpus:split=train").tokens, get("corpus:split=test").tokens
    assert torch.equal(train, get("corpus").tokens) and not torch.equal(train, test)
    assert set(test.unique().tolist()) <= set(get("corpus:split=train+test", nsamples=16).tokens[8:].unique().tolist())


def test_text_to_be_sampled_is_a_request_that_the_digest_covers(folder):
    alone = get("self", nsamples=6, words=False, seed=5)
    assert alone.tokens.shape == (0, 16) and alone.sampled.num == 6 and alone.sampled.seed == 5
    assert alone.sampled.start is None and get("self").sampled.start == 1, "the tokenizer knows the begin-of-text token"
    assert alone.description == "6 x 16 tokens sampled from the model itself (seed 5)"
    joined = get("self:num=3:temperature=1.3,a.txt", seed=5)
    assert joined.description.endswith(
        "4 x 16 tokens of a.txt (1 document) and 3 x 16 tokens sampled from the model itself (seed 5, temperature 1.3)"
    )
    requests = ("self", "self:num=5", "self:seed=9", "self:temperature=2", "a.txt", "a.txt,self:num=5")
    assert len({get(request).digest for request in requests}) == len(requests)


def test_sampled_rows_are_as_long_as_the_data(folder):
    (folder / "short.txt").write_text(text(10))
    data = get("short.txt,self")
    assert data.tokens.shape == (1, 11) and data.sampled.seqlen == 11, "a document and the token that ends it"


def test_a_set_that_is_ready_is_taken_as_it_is(folder):
    data = get("a.txt,self:num=2")
    assert get(data) is data


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("self:num=0", "num=0 has to be a whole number, 1 or more"),
        ("self:num=-1", "num=-1 has to be a whole number, 1 or more"),
        ("self:nums=4", "self has no option 'nums'; did you mean num\\?"),
        ("self:split=train", "self has no option 'split'; there are num, seed, temperature"),
        ("pydoc:concat", "pydoc has no option 'concat'; there are num, split"),
        ("pydoc:seed=3", "pydoc has no option 'seed'"),
        ("self:temperature=0", "temperature=0 has to be a number above 0"),
        ("self:temperature=hot", "temperature=hot has to be a number above 0"),
        ("self:num=2:num=3", "num of self is given twice"),
        ("self:num=2,self:num=3", "names self twice"),
        ("pydoc,,self", "a source without a name"),
        ("pydoc,self,a.txt,b.txt,corpus", "5 sources cannot share nsamples=4; give each its num="),
        ("pydoc:split=", "split= has no value"),
        ("pydoc:split=train", "pydoc has no splits; leave split=train out"),
        ("a.txt:split=train", "a.txt has no splits"),
        ("corpus:split=dev", "corpus has no split 'dev'"),
        ("foo:num=2", "the dataset foo cannot be fetched|there is no dataset 'foo'"),
        ("a.txt,missing.txt:num=3", "there is no calibration file missing.txt"),
        ("short.txt,a.txt", "rows of one length are needed, these are 1 x 11 tokens of short.txt .* use seqlen=11"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_one_sentence(dataset, message, folder):
    (folder / "short.txt").write_text(text(10))
    with pytest.raises(CalibrationError, match=message) as error:
        get(dataset)
    assert "\n" not in str(error.value)
