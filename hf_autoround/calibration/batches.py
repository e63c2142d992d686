# SPDX-License-Identifier: Apache-2.0
"""Documents to rows of tokens: short ones are packed together, nothing is dropped or padded.

Rows that are all equally long, and not longer than asked for, are taken as they are. Everything else is one long stream
of tokens, cut into rows. So there is never a mask. Several sources are put one after the other; text that the model itself
is to write is only asked for here, since nothing reads weights before everything is checked.

Shapes: N samples, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_autoround.calibration.sources import DEFAULT_DATASET, OTHERS, Document, open_source, records
from hf_autoround.calibration.spec import SELF, SourceSpec, parse_dataset
from hf_autoround.errors import CalibrationError

_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer spends on text, so what is read is enough
_FEWEST = 8  # tokens of the shortest row that says anything


@dataclass(frozen=True)
class SampledText:
    """What the model is asked to write: `num` rows of `seqlen` tokens, at a `temperature` (1: its own probabilities).

    A row begins with the token `start` (None: the model's own) and `prompt` tokens that are of a row of data, if there is
    data: see sampling.py.
    """

    num: int
    seqlen: int
    seed: int
    temperature: float = 1.0
    prompt: int = 4
    start: int | None = None

    def __str__(self) -> str:
        warmth = f", temperature {self.temperature:g}" if self.temperature != 1 else ""
        return f"{self.num} x {self.seqlen} tokens sampled from the model itself (seed {self.seed}{warmth})"


@dataclass(frozen=True)
class CalibrationSet:
    """The samples (N, T), what is to be sampled from the model besides, and what both are for the log: a description, and
    a digest of the tokens and the request."""

    tokens: Tensor
    description: str
    sampled: SampledText | None = None

    @property
    def samples(self) -> int:
        """How many samples there will be."""
        return len(self.tokens) + (self.sampled.num if self.sampled else 0)

    @property
    def digest(self) -> str:
        """A digest of the tokens and the request for more: other data, another digest."""
        digest = hashlib.sha256(self.tokens.to(torch.int64).numpy().tobytes())
        if self.sampled is not None:
            digest.update(repr(self.sampled).encode())
        return digest.hexdigest()


def calibration_set(
    dataset: Any,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    vocabulary: int,
    longest: int | None = None,
    seed: int = 42,
    self_samples: int = 0,
) -> CalibrationSet:
    """Return `nsamples` rows of `seqlen` tokens, or as many as the data gives.

    `dataset` is a string as spec.py has it (sources that do not say `num` share `nsamples`), a list of texts, lists of
    token ids or tensors, or a datasets.Dataset; None is the default Hub dataset, a CalibrationSet is returned as it is.
    `self_samples` rows are to be sampled from the model besides, unless the string asks for some itself.
    `tokenizer` is only needed for texts. `longest` is what the model was made for, `seed` that of text to be sampled.

    Raises CalibrationError for data that cannot be read, or does not fit the model.
    """
    if isinstance(dataset, CalibrationSet):
        return dataset
    notes = []
    if longest is not None and seqlen > longest:
        notes.append(f"rows cut from {seqlen} to the model's {longest} tokens")
        seqlen = longest
    if nsamples < 1 or seqlen < _FEWEST:
        raise CalibrationError(f"nsamples={nsamples}, seqlen={seqlen}: at least 1 sample of {_FEWEST} tokens is needed")
    sources: list[tuple[Any, int]] = [(dataset, nsamples)]
    if dataset is None or isinstance(dataset, str):
        sources = list(_numbered(parse_dataset(dataset or DEFAULT_DATASET), nsamples))
    if self_samples and not any(_is_self(source) for source, _ in sources):
        sources += list(_numbered(parse_dataset(f"self:num={self_samples}"), nsamples))
    data = [(source, number) for source, number in sources if not _is_self(source)]
    rows, descriptions = [], []
    for source, number in data:
        tokens, description = _read(source, tokenizer, number, seqlen, vocabulary)
        rows.append(tokens)
        descriptions.append(description)
        if len(tokens) < number:
            notes.append(f"{number} were asked for{f' of {_name(source)}' if len(sources) > 1 else ''}, it has no more")
    lengths = {tokens.shape[1] for tokens in rows}
    if len(lengths) > 1:
        raise CalibrationError(
            f"rows of one length are needed, these are {' and '.join(descriptions)}; use seqlen={min(lengths)}"
        )
    joined = torch.cat(rows) if rows else torch.empty((0, seqlen), dtype=torch.int64)
    sampled = None
    for source, number in sources:
        if _is_self(source):
            sampled = SampledText(
                num=number,
                seqlen=joined.shape[1],
                seed=seed if source.seed is None else source.seed,
                temperature=source.temperature or 1.0,
                start=getattr(tokenizer, "bos_token_id", None),
            )
            descriptions.append(str(sampled))
    return CalibrationSet(joined, "; ".join([" and ".join(descriptions), *notes]), sampled)


def _is_self(source: Any) -> bool:
    return isinstance(source, SourceSpec) and source.name == SELF


def _numbered(specs: list[SourceSpec], nsamples: int) -> Iterator[tuple[SourceSpec, int]]:
    """Yield each source with how many rows it is to give: as many as it says, or a share of nsamples."""
    sharing = [spec for spec in specs if spec.num is None]
    if len(sharing) > nsamples:
        raise CalibrationError(f"{len(sharing)} sources cannot share nsamples={nsamples}; give each its num=")
    shares = iter(nsamples // len(sharing) + (place < nsamples % len(sharing)) for place in range(len(sharing)))
    for spec in specs:
        yield spec, next(shares) if spec.num is None else spec.num


def _read(source: Any, tokenizer: Any, number: int, seqlen: int, vocabulary: int) -> tuple[Tensor, str]:
    """Return the rows of one source and a description of them."""
    name = _name(source)
    documents = _documents(source, number * seqlen * _CHARACTERS_PER_TOKEN)
    tokens, used = _rows(documents, tokenizer, number, seqlen, name)
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise CalibrationError(
            f"{name} holds token {int(tokens.max())}, the model knows {vocabulary}: is it another tokenizer's?"
        )
    return tokens, f"{len(tokens)} x {tokens.shape[1]} tokens of {name} ({used} {'document' if used == 1 else 'documents'})"


def _name(source: Any) -> str:
    """Return what to call the data: a file without its folder, so that a model card says nothing of a machine."""
    if isinstance(source, SourceSpec):
        return Path(source.name).name if Path(source.name).is_file() else source.name
    return f"a {type(source).__name__}"


def _documents(source: Any, characters: int) -> Iterable[Document]:
    if isinstance(source, SourceSpec):
        return open_source(source.name, characters, source.split)
    if isinstance(source, Tensor):
        return list(source if source.ndim == 2 else source.reshape(1, -1))
    if isinstance(source, list | tuple):
        return [_document(entry) for entry in source]
    if _is_dataset(source):
        return records(source, "the dataset")
    raise CalibrationError(f"calibration data cannot be a {type(source).__name__}; {OTHERS}")


def _is_dataset(dataset: Any) -> bool:
    """Say whether this is a datasets.Dataset (or one that streams)."""
    return getattr(dataset, "column_names", None) is not None or type(dataset).__module__.startswith("datasets.")


def _document(entry: Any) -> Document:
    if isinstance(entry, dict) or type(entry).__name__ == "BatchEncoding":
        if "input_ids" in entry:
            return entry["input_ids"]
        if "text" in entry:
            return entry["text"]
        raise CalibrationError(f"a calibration record has the keys {', '.join(map(str, entry))}; one has to be text or input_ids")
    return entry


def _rows(documents: Iterable[Document], tokenizer: Any, nsamples: int, seqlen: int, name: str) -> tuple[Tensor, int]:
    """Return the rows and how many documents went into them."""
    pieces: list[list[int]] = []
    total = 0
    for ids in _tokenized(documents, tokenizer):
        pieces.append(ids)
        total += len(ids)
        if total >= nsamples * seqlen:
            break
    lengths = {len(piece) for piece in pieces}
    if len(lengths) == 1 and _FEWEST <= next(iter(lengths)) <= seqlen:
        return torch.tensor(pieces[:nsamples]), min(len(pieces), nsamples)
    if total < _FEWEST:
        raise CalibrationError(f"{name} gives {total} tokens; {OTHERS}")
    stream = torch.tensor([token for piece in pieces for token in piece])
    length = min(seqlen, total)
    count = min(nsamples, total // length)
    return stream[: count * length].view(count, length), len(pieces)


def _tokenized(documents: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            ids = document.tolist() if isinstance(document, Tensor) else document
            ids = list(ids) if isinstance(ids, list | tuple) else [ids]
            while ids and isinstance(ids[0], list):  # (1, T) is one row
                ids = [token for row in ids for token in row]
            if not all(isinstance(token, int) for token in ids):
                raise CalibrationError(f"calibration document {number} is neither a text nor a list of token ids; {OTHERS}")
            yield ids
            continue
        if tokenizer is None:
            raise CalibrationError(
                "calibration texts need a tokenizer and the model folder has none; "
                "pass processing_class=, or token ids as dataset"
            )
        ids = tokenizer(document, verbose=False)["input_ids"]
        separated = tokenizer.bos_token_id in ids[:1] or tokenizer.eos_token_id in ids[-1:]
        yield ids if separated or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
