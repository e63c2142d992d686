# SPDX-License-Identifier: Apache-2.0
"""Where calibration documents come from.

To add a source: a function `(name, characters) -> documents or None` and a line in SOURCES. A source that does not know
the name returns None and the next one is asked. `characters` is how much text will be used at the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_autoround.errors import CalibrationError

DEFAULT_DATASET = "NeelNanda/pile-10k"
OTHERS = "pass a local text, json, jsonl or parquet file, a list of texts, or pydoc (Python's own manual, always at hand)"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

Document = Any  # a text, or a list of token ids
Source = Callable[[str, int], Iterable[Document] | None]


def open_source(name: str, characters: int) -> Iterable[Document]:
    """Return the documents that a dataset name stands for.

    Raises CalibrationError if there is no such file, or the Hub cannot be reached.
    """
    for source in SOURCES:
        documents = source(name, characters)
        if documents is not None:
            return documents
    raise CalibrationError(f"there is no dataset {name!r}; {OTHERS}")


def python_manual(name: str, characters: int) -> Iterable[Document] | None:
    """`pydoc`: the text of Python's manual that every CPython carries."""
    if name != "pydoc":
        return None
    from pydoc_data.topics import topics

    return [topics[topic] for topic in sorted(topics)]


def local_file(name: str, characters: int) -> Iterable[Document] | None:
    """A text file is one document; json, jsonl and parquet have one per record."""
    path = Path(name).expanduser()
    if not path.is_file():
        if path.suffix in (".txt", *_BUILDERS) or path.is_absolute():
            raise CalibrationError(f"there is no calibration file {name}; {OTHERS}")
        return None
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


def hub_dataset(name: str, characters: int) -> Iterable[Document] | None:
    """A dataset on the Hub, streamed: its `train` split."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return records(load_dataset(name, split="train", streaming=True), name)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise CalibrationError(f"the dataset {name} cannot be fetched: the Hub is out of reach; {OTHERS}") from error
    except (DatasetNotFoundError, HFValidationError, FileNotFoundError, ValueError) as error:
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


SOURCES: tuple[Source, ...] = (python_manual, local_file, hub_dataset)
