# SPDX-License-Identifier: Apache-2.0
"""One checkpoint folder in one format: a sink for the stream of a checkpoint's items.

Everything is written into a folder with another name first; a folder that carries its final name is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_autoround.formats.base import Format, StoredTensor
from hf_autoround.formats.shard_writer import ShardWriter
from hf_autoround.layers.sites import QuantizedLayer
from hf_autoround.models.loading import LazyModel
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.streams.shards import Item, SourceKey


def manifest(lazy: LazyModel, plan: QuantPlan, keys: list[SourceKey], target: Format) -> dict[str, StoredTensor]:
    """Return name -> (shape, dtype) of every tensor that a checkpoint in this format will hold."""
    tensors: dict[str, StoredTensor] = {}
    for source in keys:
        entry = lazy.checkpoint.entries[source.key]
        if not source.sites:
            tensors[source.key] = (entry.shape, entry.dtype)
        for name, site in source.sites:
            layer, place = target.stack(name) or (name, None)
            for part, (shape, dtype) in target.stored(plan, site, entry.dtype).items():
                if place is not None:
                    so_far = tensors.get(f"{layer}.{part}", ((0,), dtype))[0][0]
                    shape = (max(so_far, place + 1), *shape)
                tensors[f"{layer}.{part}"] = (shape, dtype)
    return tensors


class CheckpointSink:
    """Takes items and makes a folder of them."""

    def __init__(
        self, folder: Path, target: Format, lazy: LazyModel, plan: QuantPlan, keys: list[SourceKey], max_shard_size: int
    ) -> None:
        self.folder, self.target, self.plan = folder, target, plan
        self.dtypes = {name: lazy.checkpoint.entries[source.key].dtype for source in keys for name, _ in source.sites}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.writer = ShardWriter(folder, manifest(lazy, plan, keys, target), max_shard_size)

    def add(self, item: Item) -> None:
        """Write one item."""
        if isinstance(item.content, QuantizedLayer):
            assert item.site is not None
            layer, place = self.target.stack(item.name) or (item.name, None)
            for part, tensor in self.target.store(self.plan, item.site, item.content, self.dtypes[item.name]).items():
                self.writer.add(f"{layer}.{part}", tensor, place)
        else:
            self.writer.add(item.name, item.content)

    def close(self) -> None:
        """Finish the weight files."""
        self.writer.close()

    def abandon(self) -> None:
        """Give up: nothing of it may be taken for a checkpoint."""
        self.writer.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)


def checkpoint_names(lazy: LazyModel, keys: list[SourceKey]) -> dict[str, str]:
    """Return layer name in memory -> name in the checkpoint, also of what is not quantized."""
    leaf = ".weight"
    plain = {name.removesuffix(leaf): key.removesuffix(leaf) for key, name in lazy.keys.items() if name.endswith(leaf)}
    return plain | {site.name: name for source in keys for name, site in source.sites}


def write_config(
    folder: Path, target: Format, model_config: Mapping[str, Any], plan: QuantPlan, names: Mapping[str, str]
) -> None:
    """Write config.json: the model's (`model_config` is the source's), with how it is quantized.

    `names` maps layer names to what the checkpoint calls them.
    """
    source = {key: value for key, value in model_config.items() if key != "quantization_config"}
    content = target.model_config(source, plan, names)
    quantization_config = target.config(plan, names)
    if quantization_config is not None:
        content["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
