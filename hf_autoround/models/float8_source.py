# SPDX-License-Identifier: Apache-2.0
"""Float checkpoints that store their weights in 8 bits: read as if they were stored in 16.

DeepSeek, Qwen and others publish weights as float8 with a scale for each block of 128 x 128 (`quant_method: fp8`,
https://huggingface.co/docs/transformers/quantization/finegrained_fp8); compressed-tensors' `float-quantized` has one for
the tensor, for each row or for each block. A weight is `values * scale` in all of them.

Shapes: O out features, I in features, B rows and C columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_autoround.errors import CheckpointError
from hf_autoround.models.checkpoint import Checkpoint, TensorEntry

_SCALES = ("weight_scale_inv", "weight_scale")  # both are multiplied with
_NOT_NEEDED = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")


def refuse_source(config: Mapping[str, Any]) -> str | None:
    """Return why a checkpoint with this `quantization_config` cannot be read as floats, or None."""
    method, kind = config.get("quant_method"), config.get("format")
    if method == "fp8" or (method == "compressed-tensors" and kind in _FLOAT_FORMATS):
        return None
    name = f"{method}, {kind}" if kind else str(method)
    return f"already quantized ({name}); start from its float checkpoint (float8 ones are read: fp8, {_FLOAT_FORMATS[0]})"


class Float8Checkpoint:
    """A checkpoint whose float8 weights come out in `dtype`, their scales left out."""

    def __init__(self, stored: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.stored, self.folder = stored, stored.folder
        self.dtype, self.block = dtype, _block(config)
        self.scales = {key: _scale_of(key, stored.entries) for key in stored.entries if _is_float8(stored.entries[key])}
        left_out = {*self.scales.values()}
        self.entries = {
            key: TensorEntry(entry.shape, dtype, entry.file) if key in self.scales else entry
            for key, entry in stored.entries.items()
            if key not in left_out and key.rpartition(".")[2] not in _NOT_NEEDED
        }

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor); float8 weights multiplied with their scales."""
        for key, tensor in self.stored.read(keys):
            yield key, self._float(key, tensor) if key in self.scales else tensor

    def read_slice(self, key: str, index: int) -> Tensor:
        """Return `tensor[index]`."""
        tensor = self.stored.read_slice(key, index)
        return self._float(key, tensor, index) if key in self.scales else tensor

    def fingerprint(self) -> str:
        """Return the digest of what is stored."""
        return self.stored.fingerprint()

    def _float(self, key: str, values: Tensor, index: int | None = None) -> Tensor:
        name = self.scales[key]
        scale = next(self.stored.read([name]))[1] if index is None else self.stored.read_slice(name, index)
        return (values.float() * _spread(scale.float(), tuple(values.shape), self.block, key)).to(self.dtype)


def _spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None, key: str) -> Tensor:
    """Return a scale that broadcasts with a weight (..., O, I): one for all, (..., O, 1), or one for each block."""
    if scale.numel() == 1:
        return scale.reshape(())
    rows, columns = shape[-2:]
    if scale.ndim == 1 and len(scale) == rows:
        return scale.unsqueeze(-1)
    if scale.shape[-2:] == (rows, 1):
        return scale
    if block is not None and scale.shape[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
        spread = scale.repeat_interleave(block[0], -2)[..., :rows, :]
        return spread.repeat_interleave(block[1], -1)[..., :columns]
    raise CheckpointError(f"{key} is {rows} x {columns} and its scale {tuple(scale.shape)}, which fits no block size it names")


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (B, C) if scales are for blocks."""
    size = config.get("weight_block_size")
    for group in (config.get("config_groups") or {}).values():
        size = size or (group.get("weights") or {}).get("block_structure")
    return (int(size[0]), int(size[1])) if size else None


def _is_float8(entry: TensorEntry) -> bool:
    return entry.dtype == torch.float8_e4m3fn and len(entry.shape) >= 2


def _scale_of(key: str, entries: Mapping[str, TensorEntry]) -> str:
    path, dot, leaf = key.rpartition(".")
    # fused experts have no module of their own: gate_up_proj, gate_up_proj_scale_inv
    candidates = [f"{path}{dot}{name}" for name in _SCALES] if leaf == "weight" else [f"{key}_scale_inv", f"{key}_scale"]
    for name in candidates:
        if name in entries:
            return name
    raise CheckpointError(f"{key} is stored in float8 and there is no {candidates[0]} beside it")
