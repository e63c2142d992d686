# SPDX-License-Identifier: Apache-2.0
"""Safetensors files written tensor by tensor, in any order, without holding a file's content in memory.

Names, shapes and types are known from the plan, so a file's header is written first and each tensor goes to its place
when it comes. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hf_autoround.errors import OutputError
from hf_autoround.formats.base import StoredTensor
from hf_autoround.models.checkpoint import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ShardWriter:
    """The `model*.safetensors` files of one checkpoint folder, and their index if there are several."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor], max_shard_size: int) -> None:
        self.folder = folder
        self.places: dict[str, _Place] = {}
        self.missing = {name: _size(tensor) for name, tensor in tensors.items()}  # bytes
        self.total = sum(_size(tensor) for tensor in tensors.values())
        shards = _split(tensors, max_shard_size)
        self.files: dict[str, int] = {}
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(file, {name: tensors[name] for name in names})

    def add(self, name: str, tensor: Tensor, row: int | None = None) -> None:
        """Write one tensor to its place, or that of one row of its leading dimension.

        Raises OutputError if the disk is full.
        """
        place = self.places[name]
        shape = place.shape if row is None else place.shape[1:]
        assert tuple(tensor.shape) == shape and tensor.dtype == place.dtype, (name, tensor.shape, tensor.dtype, place)
        content = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.missing[name] -= len(content)
        assert self.missing[name] >= 0, f"written twice: {name}"
        start = place.offset + (row or 0) * len(content)
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(self.files[place.file], content[written:], start + written)
        except OSError as error:
            raise _cannot_write(self.folder / place.file, error) from error

    def close(self) -> None:
        """Flush the files and write the index; every tensor must have come."""
        never = sorted(name for name, size in self.missing.items() if size)
        assert not never, f"never written: {never[:3]}"
        count = len(self.files)
        for file, descriptor in self.files.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise _cannot_write(self.folder / file, error) from error
        self.abandon()
        if count > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {name: place.file for name, place in sorted(self.places.items())},
            }
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Close the files that are open, as they are."""
        while self.files:
            os.close(self.files.popitem()[1])

    def _begin(self, file: str, tensors: Mapping[str, StoredTensor]) -> None:
        # wide types first, as the reference writer does, so that every tensor is aligned
        names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            shape, dtype = tensors[name]
            size = _size(tensors[name])
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        path = self.folder / file
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self.files[file] = descriptor
            os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
            os.ftruncate(descriptor, start + offset)
        except OSError as error:
            raise _cannot_write(path, error) from error
        for name in names:
            begin = header[name]["data_offsets"][0]  # type: ignore[index]
            self.places[name] = _Place(file, start + begin, tuple(tensors[name][0]), tensors[name][1])


def _size(tensor: StoredTensor) -> int:
    return prod(tensor[0]) * tensor[1].itemsize


def _split(tensors: Mapping[str, StoredTensor], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _size(tensor) > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _size(tensor)
    return shards


def _cannot_write(path: Path, error: OSError) -> OutputError:
    advice = "make room on that disk and start again" if error.errno == errno.ENOSPC else "check the folder"
    return OutputError(f"cannot write {path}: {error.strerror}; {advice}")
