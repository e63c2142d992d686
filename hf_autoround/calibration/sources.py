# SPDX-License-Identifier: Apache-2.0
"""Where calibration documents come from.

To add a source: a function `(name, characters, split) -> documents or None` and a line in SOURCES. A source that does not
know the name returns None and the next one is asked. `characters` is how much text will be used at the most, `split` the
part of the data that is wanted, if one was named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from hf_autoround.errors import CalibrationError

DEFAULT_DATASET = "NeelNanda/pile-10k"
OTHERS = "pass a local text, json, jsonl or parquet file, a list of texts, or pydoc (Python's own manual, always at hand)"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

Document = Any  # a text, or a list of token ids
Source = Callable[[str, int, str | None], Iterable[Document] | None]


def open_source(name: str, characters: int, split: str | None = None) -> Iterable[Document]:
    """Return the documents that a dataset name stands for.

    Raises CalibrationError if there is no such file or split, or the Hub cannot be reached.
    """
    for source in SOURCES:
        documents = source(name, characters, split)
        if documents is not None:
            return documents
    raise CalibrationError(f"there is no dataset {name!r}; {OTHERS}")


def python_manual(name: str, characters: int, split: str | None) -> Iterable[Document] | None:
    """`pydoc`: the text of Python's manual that every CPython carries."""
    if name != "pydoc":
        return None
    _refuse_split(name, split)
    from pydoc_data.topics import topics

    return [topics[topic] for topic in sorted(topics)]


def local_file(name: str, characters: int, split: str | None) -> Iterable[Document] | None:
    """A text file is one document; json, jsonl and parquet have one per record."""
    path = Path(name).expanduser()
    if not path.is_file():
        if path.suffix in (".txt", *_BUILDERS) or path.is_absolute():
            raise CalibrationError(f"there is no calibration file {name}; {OTHERS}")
        return None
    _refuse_split(name, split)
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        try:
            with path.open(encoding="utf-8") as stream:
                return [stream.read(characters)]
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{name} cannot be read as UTF-8 text: {error}; {OTHERS}") from error
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return records(load_dataset(builder, data_files=str(path), split="train"), name)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise CalibrationError(f"{name} cannot be read as {builder}: {error}") from error


def hub_dataset(name: str, characters: int, split: str | None) -> Iterable[Document] | None:
    """A dataset on the Hub (or a folder of data files), streamed: its `train` split, or those of "test+validation"."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        parts = [load_dataset(name, split=part.strip(), streaming=True) for part in (split or "train").split("+")]
        return chain.from_iterable(records(part, name) for part in parts)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise CalibrationError(f"the dataset {name} cannot be fetched: the Hub is out of reach; {OTHERS}") from error
    except (DatasetNotFoundError, HFValidationError, FileNotFoundError, ValueError) as error:
        if split is not None and "split" in str(error):
            raise CalibrationError(f"the dataset {name} has no split {split!r}: {str(error).splitlines()[0]}") from error
        raise CalibrationError(f"there is no dataset {name!r}, neither a file nor on the Hub; {OTHERS}") from error


def records(dataset: Any, name: str) -> Iterator[Document]:
    """Return the texts, or the token ids, of a datasets.Dataset's records.

    Raises CalibrationError if it has neither `input_ids` nor `text` nor a single column.
    """
    columns = list(dataset.column_names or next(iter(dataset)).keys())
    column = next((known for known in ("input_ids", "text") if known in columns), columns[0] if len(columns) == 1 else None)
    if column is None:
        raise CalibrationError(f"{name} has the columns {', '.join(columns)}; one of them has to be called text or input_ids")
    return (record[column] for record in dataset if record[column] is not None)


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise CalibrationError(f"{name} has no splits; leave split={split} out")


SOURCES: tuple[Source, ...] = (python_manual, local_file, hub_dataset)
