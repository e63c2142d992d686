# SPDX-License-Identifier: Apache-2.0
"""Documents to rows of tokens: short ones are packed together, nothing is dropped or padded.

Rows that are all equally long, and not longer than asked for, are taken as they are. Everything else is one long stream
of tokens, cut into rows. So there is never a mask.

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
from hf_autoround.errors import CalibrationError

_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer spends on text, so what is read is enough
_FEWEST = 8  # tokens of the shortest row that says anything


@dataclass(frozen=True)
class CalibrationSet:
    """The samples (N, T), and what they are for the log: a description and a digest of the tokens."""

    tokens: Tensor
    description: str

    @property
    def digest(self) -> str:
        """A digest of the tokens: other data, another digest."""
        return hashlib.sha256(self.tokens.to(torch.int64).numpy().tobytes()).hexdigest()


def calibration_set(
    dataset: Any, tokenizer: Any, *, nsamples: int, seqlen: int, vocabulary: int, longest: int | None = None
) -> CalibrationSet:
    """Return `nsamples` rows of `seqlen` tokens, or as many as the data gives.

    `dataset` is a name or path, a list of texts, lists of token ids or tensors, or a datasets.Dataset; None is the
    default Hub dataset. `tokenizer` is only needed for texts. `longest` is what the model was made for.

    Raises CalibrationError for data that cannot be read, or does not fit the model.
    """
    notes = []
    if longest is not None and seqlen > longest:
        notes.append(f"rows cut from {seqlen} to the model's {longest} tokens")
        seqlen = longest
    if nsamples < 1 or seqlen < _FEWEST:
        raise CalibrationError(f"nsamples={nsamples}, seqlen={seqlen}: at least 1 sample of {_FEWEST} tokens is needed")
    name = _name(dataset)
    documents = _documents(dataset, nsamples * seqlen * _CHARACTERS_PER_TOKEN)
    tokens, used = _rows(documents, tokenizer, nsamples, seqlen, name)
    if len(tokens) < nsamples:
        notes.append(f"{nsamples} were asked for, it has no more")
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise CalibrationError(
            f"{name} holds token {int(tokens.max())}, the model knows {vocabulary}: is it another tokenizer's?"
        )
    samples = f"{len(tokens)} x {tokens.shape[1]} tokens of {name} ({used} {'document' if used == 1 else 'documents'})"
    return CalibrationSet(tokens, "; ".join([samples, *notes]))


def _name(dataset: Any) -> str:
    """Return what to call the data: a file without its folder, so that a model card says nothing of a machine."""
    if isinstance(dataset, str):
        return Path(dataset).name if Path(dataset).is_file() else dataset
    return DEFAULT_DATASET if dataset is None else f"a {type(dataset).__name__}"


def _documents(dataset: Any, characters: int) -> Iterable[Document]:
    if dataset is None or isinstance(dataset, str):
        return open_source(dataset or DEFAULT_DATASET, characters)
    if isinstance(dataset, Tensor):
        return list(dataset if dataset.ndim == 2 else dataset.reshape(1, -1))
    if isinstance(dataset, list | tuple):
        return [_document(entry) for entry in dataset]
    if _is_dataset(dataset):
        return records(dataset, "the dataset")
    raise CalibrationError(f"calibration data cannot be a {type(dataset).__name__}; {OTHERS}")


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
