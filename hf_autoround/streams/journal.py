# SPDX-License-Identifier: Apache-2.0
"""The journal: every finished block, on disk, as plain codes and scales, and the text that the model wrote for them.

A run that was killed goes on from here, and every checkpoint is written from here, so resuming exists once and not once
per format. Blocks appear under their names only when they are whole. Activations are not kept: a resumed run computes
them again from the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_autoround.errors import OutputError, ResumeError
from hf_autoround.layers.sites import QuantizedLayer
from hf_autoround.numerics import QuantizedTensor, data_type
from hf_autoround.scheme import Scheme
from hf_autoround.tuning import BlockResult

FOLDER = ".autoround-journal"
_SAMPLED = "sampled"  # beside the names of units


class Journal:
    """The finished blocks of one run, in a folder; `signature` says what the run was started with."""

    def __init__(self, folder: Path, signature: Mapping[str, Any]) -> None:
        self.folder, self.signature = folder, dict(signature)

    def start(self) -> None:
        """Begin, or go on with what is there.

        Raises ResumeError naming each argument that differs from the unfinished run's.
        """
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            before = json.loads(manifest.read_text())
            now = json.loads(json.dumps(self.signature))
            refuse_other_arguments(self.folder.parent, before, now)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(manifest, json.dumps(self.signature, indent=1, sort_keys=True).encode())

    def has(self, unit: str) -> bool:
        """Say whether a block is finished."""
        return self._path(unit).exists()

    def put(self, unit: str, result: BlockResult, record: Mapping[str, Any]) -> None:
        """Store a finished block with a record for the log."""
        tensors: dict[str, Tensor] = {}
        for name, layer in result.layers.items():
            tensors |= {f"{name}:{part}": tensor for part, tensor in layer.tensor.tensors().items()}
            if layer.static is not None:
                tensors[f"{name}:static"] = layer.static
        for name, tunables in result.tunables.items():
            for part, tensor in tunables.tensors().items():
                tensors[f"{name}:tunables.{part}"] = tensor
        tensors |= {f"{name}:tuned": tensor for name, tensor in result.tuned.items()}
        layers = {name: (layer.columns, layer.error) for name, layer in result.layers.items()}
        losses = {"loss_first": result.loss_first, "loss_best": result.loss_best, "best_step": result.best_step}
        metadata = {"layers": json.dumps(layers), "losses": json.dumps(losses), "record": json.dumps(dict(record))}
        self._save(unit, tensors, metadata)

    def get(self, unit: str, schemes: Mapping[str, Scheme]) -> BlockResult:
        """Return a finished block; `schemes` are those of its parameters."""
        with safe_open(self._path(unit), framework="pt") as handle:
            metadata = handle.metadata()
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        layers = {}
        for name, (columns, error) in json.loads(metadata["layers"]).items():
            parts = {part.name: tensors.get(f"{name}:{part.name}") for part in fields(QuantizedTensor)}
            static = tensors.get(f"{name}:static")
            layers[name] = QuantizedLayer(QuantizedTensor(**parts), columns, schemes[name], error, static)
        tuned = {key.removesuffix(":tuned"): tensor for key, tensor in tensors.items() if key.endswith(":tuned")}
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.partition(":tunables.")
            if part:
                found.setdefault(name, {})[part] = tensor
        tunables = {name: data_type(spec).tunables.of(parts) for name, parts in found.items() if (spec := schemes[name].weight)}
        return BlockResult(layers, tuned, tunables, **json.loads(metadata["losses"]))

    def errors(self, unit: str) -> dict[str, float]:
        """Return the relative error of each parameter of a finished block, by layer name."""
        with safe_open(self._path(unit), framework="pt") as handle:
            layers = json.loads(handle.metadata()["layers"])
        return {name.removesuffix(".weight"): round(error, 5) for name, (_, error) in layers.items()}

    def record(self, unit: str) -> dict[str, Any]:
        """Return the record that a finished block was stored with."""
        with safe_open(self._path(unit), framework="pt") as handle:
            return json.loads(handle.metadata()["record"])

    def put_sampled(self, tokens: Tensor) -> None:
        """Store the rows that were sampled from the model."""
        self._save(_SAMPLED, {"tokens": tokens}, {})

    def get_sampled(self) -> Tensor | None:
        """Return the rows that were sampled from the model, None if they have not been yet."""
        return load_file(self._path(_SAMPLED))["tokens"] if self.has(_SAMPLED) else None

    def remove(self) -> None:
        """Take the journal away; after a kill in between, what is left is no journal any more."""
        gone = self.folder.with_name(f"{self.folder.name}.done")
        os.replace(self.folder, gone)
        shutil.rmtree(gone)

    def _save(self, unit: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        partial = self._path(unit).with_suffix(".partial")
        try:
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, partial, metadata)
            flush(partial)
            os.replace(partial, self._path(unit))
        except (SafetensorError, OSError) as error:
            raise OutputError(f"cannot write {partial}: {error}; what is finished is kept: make room and resume") from error

    def _path(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"


def refuse_other_arguments(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ResumeError naming each argument in which a run differs from the one that was started in `folder`."""
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        what = "; ".join(f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}" for key in differing)
        raise ResumeError(f"cannot resume {folder}: {what}. Use the same arguments, or another folder")


def digests(signature: Mapping[str, Any]) -> dict[str, Any]:
    """Return a signature with long values replaced by their digests: small enough to keep beside a finished model."""
    short = {}
    for key, value in json.loads(json.dumps(dict(signature))).items():
        text = json.dumps(value, sort_keys=True)
        short[key] = value if len(text) <= 80 else hashlib.sha256(text.encode()).hexdigest()
    return short


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that it is either absent, old or whole.

    Raises OutputError if it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        flush(partial)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def flush(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
