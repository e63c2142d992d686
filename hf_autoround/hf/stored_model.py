# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint, ours or another tool's, against the model it is loaded into: which layer lies packed, and how.

The configuration says what should be; the files say what is. Where they differ, the files are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_autoround.errors import UnsupportedLayer
from hf_autoround.formats import AutoRoundFormat, StoredPlan
from hf_autoround.formats.auto_round import PACKING, packing_format
from hf_autoround.layers.sites import WeightSite
from hf_autoround.layouts import GPTQ, GPTQ_V1, GPTQ_V2, MLX, IndexedGPTQ, Layout
from hf_autoround.layouts.gptq_indexed import groups_in_order
from hf_autoround.models.blocks import find_sites, model_parts, other_matrices
from hf_autoround.models.checkpoint import read_tensors, stored_names
from hf_autoround.models.loading import names_in_memory
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import Scheme

logger = logging.get_logger(__name__)


_WEIGHTS = ("qweight", "weight_packed", "weight")  # what files call the tensor of codes, or of floats


@dataclass(frozen=True)
class StoredModel:
    """What to make of a checkpoint: the packed layers, the names of those with a bias, and the same in auto_round's words.

    `config` is None if auto_round cannot say it: groups of inputs out of order. `relayout` is the layout that layers get once
    they are loaded, None if they keep the file's.
    """

    layers: dict[WeightSite, tuple[Scheme, Layout]]
    biases: set[str]
    config: dict[str, Any] | None
    relayout: Layout | None


def read_stored_model(model: PreTrainedModel, stored: StoredPlan, files: Iterable[str] | None) -> StoredModel:
    """Return what a checkpoint holds for a model on the meta device; `files` are its weight files (None: not known)."""
    parts, files = model_parts(model), list(files or ())
    stored = replace(stored, layout=_stored_layout(stored.layout, files))
    keys = {name: key for key, name in names_in_memory(model, stored_names(files)).items()}
    scattered_layers = _scattered_layers(files, {key: name for name, key in keys.items()}, stored)
    sites = find_sites(model)
    names = disk_names(sites, keys)
    layers: dict[WeightSite, tuple[Scheme, Layout]] = {}
    kept = dict.fromkeys(other_matrices(model, parts, sites), "it is no layer of its own")
    for site in sites:
        own = names.get(site.name, site.name)
        inside = any(name.startswith(f"{path}.") for path in stored.blocks or (parts.blocks,) for name in (site.name, own))
        scheme = stored.scheme_of(own, inside)
        if scheme is not None and (not files or _is_packed(site, scheme, stored.layout, keys)):
            layers[site] = scheme, _indexed(stored.layout) if site.name in scattered_layers else stored.layout
            continue
        if scheme is not None:
            logger.warning(
                f"{site.name} should have {scheme.name} by the checkpoint's config, but the file holds it as float: loaded so"
            )
        if parts.block_of(site.name) is not None or site.name == parts.head:
            kept[site.name] = "the checkpoint holds it as float"
    _refuse_others(layers, stored.layout, keys)
    schemes = {site.name: scheme for site, (scheme, _) in layers.items()}
    plan = QuantPlan(stored.scheme, tuple(layers), schemes, kept, parts.blocks)
    loaded = loaded_layout(stored)
    config = AutoRoundFormat().config(plan, names) | {"packing_format": packing_format(loaded)}
    biases = {site.name for site in layers if f"{site.name}.bias" in keys}
    return StoredModel(layers, biases, None if scattered_layers else config, None if loaded == stored.layout else loaded)


def loaded_layout(stored: StoredPlan) -> Layout:
    """Return the layout that layers have once they are loaded: the file's, if auto_round has a name for it."""
    if stored.layout.name in {layout.name for layout in PACKING.values()}:
        return stored.layout
    schemes = [scheme.weight for scheme in (stored.scheme, *stored.overrides.values()) if scheme.weight is not None]
    return GPTQ_V1 if all(weight.symmetric for weight in schemes) else GPTQ_V2


def disk_names(sites: Iterable[WeightSite], keys: Mapping[str, str]) -> dict[str, str]:
    """Return layer name in memory -> in the files; `keys` maps tensor names in memory to those in the files."""
    found = {}
    for site in sites:
        for leaf in _WEIGHTS:
            if key := keys.get(f"{site.name}.{leaf}"):
                found[site.name] = key.rpartition(".")[0]
    return found


def _is_packed(site: WeightSite, scheme: Scheme, layout: Layout, keys: Mapping[str, str]) -> bool:
    """Return whether a file holds what a packed layer has besides a weight."""
    assert scheme.weight is not None
    return any(f"{site.name}.{leaf}" in keys for leaf in layout.empty(scheme.weight, site.shape) if leaf != "weight")


def _stored_layout(layout: Layout, files: list[str]) -> Layout:
    """Return the layout with the dtype that the files' scales have, where it may have several."""
    if not isinstance(layout, MLX):
        return layout
    return next((MLX(scales.dtype) for _, scales in read_tensors(files, ".scales")), layout)


def _refuse_others(layers: Iterable[WeightSite], layout: Layout, keys: Mapping[str, str]) -> None:
    """Raise UnsupportedLayer if an MLX checkpoint holds anything else packed: its codes are called as floats are."""
    packed = {name.removesuffix(".scales") for name in keys if name.endswith(".scales")} if isinstance(layout, MLX) else set()
    for name in sorted(packed - {site.name for site in layers}):
        raise UnsupportedLayer(
            f"{name} is quantized in this MLX checkpoint, and packed layers stand for linear ones of the decoder only; "
            "convert the model without quantizing its embeddings, or quantize the float model anew"
        )


def _indexed(layout: Layout) -> Layout:
    assert isinstance(layout, GPTQ)
    return IndexedGPTQ(layout)


def _scattered_layers(files: list[str], names: Mapping[str, str], stored: StoredPlan) -> set[str]:
    """Return the layers (by name in memory) whose `g_idx` does not just count. Raises UnsupportedLayer for groups not there."""
    found = set()
    for key, group_of in read_tensors(files, ".g_idx"):
        scheme = stored.scheme_of(key.removesuffix(".g_idx"), True)
        if scheme is None or scheme.weight is None:
            continue
        in_order = groups_in_order(len(group_of), scheme.weight.granularity)
        groups = int(in_order[-1]) + 1
        if not all(-groups <= int(index) < groups for index in group_of.aminmax()):
            raise UnsupportedLayer(f"{key} names groups that are not there: {scheme.name} makes {groups}; the file is damaged")
        if not torch.equal(group_of.to(torch.int32), in_order):
            found.add(names[key].removesuffix(".g_idx"))
    return found
