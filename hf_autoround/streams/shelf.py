# SPDX-License-Identifier: Apache-2.0
"""Where tensors of all blocks wait while one block is at work: on a device, in page-locked memory, or in mapped files.

A GPU reads and writes page-locked memory by itself. A mapped file's pages are the system's to write out and read back: they
never count as the process' own memory, so a model of any depth takes no more of it than one block.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

import torch
from torch import Tensor

from hf_autoround.errors import OutputError

_ALIGNMENT = 64


@dataclass(frozen=True)
class Shelf:
    """Keeps tensors on `device`, in memory that is `page_locked`, or as files in `folder`; they may be changed in place."""

    device: torch.device
    folder: Path | None = None
    page_locked: bool = False

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies that wait here; `key` names them."""
        kept = self.room(key, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            kept[name].copy_(tensor)
        return kept

    def room(self, key: str, sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Return tensors of these shapes and dtypes with nothing in them.

        Raises OutputError if there is no room for the file.
        """
        if self.folder is None:
            where = {"device": self.device, "pin_memory": self.page_locked}
            return {name: torch.empty(shape, dtype=dtype, **where) for name, (shape, dtype) in sizes.items()}
        offsets, end = {}, 0
        for name, (shape, dtype) in sizes.items():
            offsets[name] = end
            end += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        path = self.folder / f"{key}.mapped"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if end > shutil.disk_usage(self.folder).free:  # found later, a page that cannot be written is a crash
                raise OSError(ENOSPC, "no space left on the disk")
            with path.open("wb") as stream:
                stream.truncate(max(end, 1))
                if sys.platform == "linux":  # claims the room, or another program may fill the disk
                    os.posix_fallocate(stream.fileno(), 0, max(end, 1))
        except OSError as error:
            raise OutputError(f"cannot keep {end / 1e9:.1f} GB in {path}: {error.strerror}; make room and resume") from error
        storage = torch.UntypedStorage.from_file(str(path), True, max(end, 1))
        return {
            name: torch.empty(0, dtype=dtype).set_(storage, offsets[name] // dtype.itemsize, shape)  # type: ignore[call-overload]
            for name, (shape, dtype) in sizes.items()
        }
