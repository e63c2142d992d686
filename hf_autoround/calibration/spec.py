# SPDX-License-Identifier: Apache-2.0
"""The dataset string: sources joined by commas, each with options.

    source ("," source)*      source := name (":" option "=" value)*

as in the auto-round tool: `pile.jsonl:num=64,pydoc:num=32,self:num=256`. `self` is text sampled from the model. The path of
an existing file is that file, whatever characters it holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_autoround.errors import CalibrationError
from hf_autoround.registry import suggest

SELF = "self"
_OPTIONS = ("num", "split")
_OPTIONS_OF_SELF = ("num", "seed", "temperature")
_BEFORE_OPTION = re.compile(r":(?=\w+(?:[=:]|$))")  # no option follows the colons of C:\text.txt and a:b.txt


@dataclass(frozen=True)
class SourceSpec:
    """One source: its name, and the options that were given."""

    name: str
    num: int | None = None
    split: str | None = None
    seed: int | None = None
    temperature: float | None = None


def parse_dataset(dataset: str) -> list[SourceSpec]:
    """Return the sources that a dataset string names.

    Raises CalibrationError for an option that there is not, or a value that cannot be meant.
    """
    if Path(dataset).expanduser().is_file():
        return [SourceSpec(dataset)]
    sources = [_parse_source(part.strip(), dataset) for part in dataset.split(",")]
    if [source.name for source in sources].count(SELF) > 1:
        raise CalibrationError(f"dataset {dataset!r} names {SELF} twice; name it once, with num= for the number of its rows")
    return sources


def _parse_source(part: str, dataset: str) -> SourceSpec:
    name, *options = _BEFORE_OPTION.split(part)
    if not name:
        raise CalibrationError(f"dataset {dataset!r} has a source without a name; write name:num=64,other:num=32")
    known = _OPTIONS_OF_SELF if name == SELF else _OPTIONS
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = (word.strip() for word in option.partition("="))
        if key not in known:
            hint = suggest(key, known) or f"; there are {', '.join(known)}"
            raise CalibrationError(f"dataset {dataset!r}: {name} has no option {key!r}{hint}")
        if key in given:
            raise CalibrationError(f"dataset {dataset!r}: {key} of {name} is given twice")
        given[key] = _value(key, value, dataset)
    return SourceSpec(name, **given)


def _value(key: str, value: str, dataset: str) -> Any:
    if key in ("num", "seed"):
        least = 1 if key == "num" else 0
        if value.isdecimal() and int(value) >= least:
            return int(value)
        raise CalibrationError(f"dataset {dataset!r}: {key}={value} has to be a whole number, {least} or more")
    if key == "temperature":
        if re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) and float(value) > 0:
            return float(value)
        raise CalibrationError(f"dataset {dataset!r}: temperature={value} has to be a number above 0; 1 is the model's own")
    if not value:
        raise CalibrationError(f"dataset {dataset!r}: {key}= has no value")
    return value
