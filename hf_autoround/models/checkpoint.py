# SPDX-License-Identifier: Apache-2.0
"""Reading a float checkpoint tensor by tensor: a folder of safetensors files, or a model that is already in memory.

A file is opened for one block (or one shard) and closed with it. Keeping handles open over the model would let the
process's file-backed memory grow to the size of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_autoround.errors import CheckpointError
from hf_autoround.models.memory import release_memory

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U32": torch.uint32, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_PORTION = 32 << 20


@dataclass(frozen=True)
class TensorEntry:
    """What a checkpoint says of one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """Named float tensors that are read when they are needed; `folder` is where they lie, None if in memory."""

    entries: Mapping[str, TensorEntry]
    folder: Path | None

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]: ...
    def read_slice(self, key: str, index: int) -> Tensor: ...
    def fingerprint(self) -> str: ...


class CheckpointFolder:
    """The safetensors files of a model folder. Damage is found when it is opened, not hours later."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.entries = _read_entries(folder)

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor), file by file, reopening the file every 32 MB of what was read from it.

        Raises CheckpointError naming the file that cannot be read.
        """
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.entries[key].file or "", []).append(key)
        for file, names in by_file.items():
            for portion in self._portions(names):
                try:
                    with safe_open(self.folder / file, framework="pt") as handle:
                        for name in portion:
                            yield name, handle.get_tensor(name)
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"cannot read {self.folder / file}: {error}; fetch that file again") from error
                release_memory()

    def _portions(self, names: list[str]) -> Iterator[list[str]]:
        portion: list[str] = []
        size = 0
        for name in names:
            size += self.entries[name].nbytes
            portion.append(name)
            if size >= _PORTION:
                yield portion
                portion, size = [], 0
        if portion:
            yield portion

    def read_slice(self, key: str, index: int) -> Tensor:
        """Return `tensor[index]` without reading the rest of it."""
        path = self.folder / (self.entries[key].file or "")
        try:
            with safe_open(path, framework="pt") as handle:
                return handle.get_slice(key)[index : index + 1][0]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; fetch that file again") from error

    def fingerprint(self) -> str:
        """Return a digest of config.json and of every byte of the weights: another checkpoint has another one."""
        digest = hashlib.blake2b()
        for file in ["config.json", *sorted({entry.file for entry in self.entries.values() if entry.file})]:
            digest.update(f"{file}\n".encode())
            with (self.folder / file).open("rb") as stream:
                while portion := stream.read(1 << 22):
                    digest.update(portion)
        return digest.hexdigest()


class CheckpointInMemory:
    """The tensors of a model that is already loaded, under the names its checkpoint would have."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.folder = tensors, None
        self.entries = {key: TensorEntry(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor)."""
        for key in keys:
            yield key, self.tensors[key]

    def read_slice(self, key: str, index: int) -> Tensor:
        """Return `tensor[index]`."""
        return self.tensors[key][index]

    def fingerprint(self) -> str:
        """Return a digest of the names, shapes and every byte of the tensors."""
        digest = hashlib.blake2b()
        for key, tensor in sorted(self.tensors.items()):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()


def stored_names(files: Iterable[str | Path]) -> set[str]:
    """Return the names of all tensors in some safetensors files; other files are passed over."""
    return {name for file in files if str(file).endswith(".safetensors") for name in _read_header(Path(file))}


def stored_dtypes(files: Iterable[str | Path]) -> dict[str, torch.dtype]:
    """Return the last part of the tensors' names in some safetensors files -> their dtype (that of the last, if they differ)."""
    headers = [_read_header(Path(file)) for file in files if str(file).endswith(".safetensors")]
    return {
        name.rpartition(".")[2]: DTYPES[entry["dtype"]]
        for header in headers
        for name, entry in header.items()
        if entry["dtype"] in DTYPES
    }


def read_tensors(files: Iterable[str | Path], suffix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every tensor in some safetensors files whose name ends so; small ones, for looking."""
    for file in files:
        names = [name for name in stored_names([file]) if name.endswith(suffix)]
        if names:
            with safe_open(file, framework="pt") as handle:
                for name in sorted(names):
                    yield name, handle.get_tensor(name)


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is not a safetensors index ({error}); fetch it again") from error
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        others = sorted(path.name for path in folder.glob("*.bin")) or sorted(path.name for path in folder.glob("*.gguf"))
        found = f"it holds {', '.join(others[:3])}; save it with save_pretrained first" if others else "it has no weights"
        raise CheckpointError(f"{folder} has no model.safetensors or model.safetensors.index.json: {found}")
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(folder / file).items():
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(f"{folder / file} stores {name} as {entry['dtype']}, which is not a type we can read")
            entries[name] = TensorEntry(tuple(entry["shape"]), dtype, file)
    return entries


def _read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header after checking that the file is as long as it says.

    Format: https://github.com/huggingface/safetensors#format
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < size else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; fetch that file again") from error
    if header is None:
        raise CheckpointError(f"{path} is cut off inside its header; fetch that file again")
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes where its header promises {end}; fetch that file again")
    return header
