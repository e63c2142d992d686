# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint, ours or another tool's, against the model it is loaded into: which layer lies packed, and how.

The configuration says what should be; the files say what is. Where they differ, the files are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_autoround.errors import CheckpointError, UnsupportedLayer
from hf_autoround.formats import AutoRoundFormat, StoredPlan
from hf_autoround.formats.auto_round import PACKING, float_packing, layout_for, packing_format
from hf_autoround.formats.mlx import expert_apart, expert_stack
from hf_autoround.layers.sites import WeightSite
from hf_autoround.layouts import GPTQ, IndexedGPTQ, Layout
from hf_autoround.layouts.gptq_indexed import groups_in_order
from hf_autoround.models.blocks import find_sites, model_parts, other_matrices
from hf_autoround.models.checkpoint import read_tensors, stored_dtypes, stored_names
from hf_autoround.models.loading import names_in_memory
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import Scheme

logger = logging.get_logger(__name__)


_WEIGHTS = ("qweight", "weight_packed", "weight")  # what files call the tensor of codes, or of floats
_CODES = (".qweight", ".weight_packed")  # that are never floats


@dataclass(frozen=True)
class StoredModel:
    """What to make of a checkpoint: the packed layers, the names of those with a bias, and the same in auto_round's words.

    `config` is None if auto_round cannot say it: groups of inputs out of order. `relayouts` are the layouts that layers get
    once they are loaded, by the scheme of those that do not keep the file's. `stacks` are layers of all experts in the file,
    as they would be called in memory -> the experts' layers.
    """

    layers: dict[WeightSite, tuple[Scheme, Layout]]
    biases: set[str]
    config: dict[str, Any] | None
    relayouts: dict[Scheme, Layout]
    stacks: dict[str, list[str]]


def read_stored_model(model: PreTrainedModel, stored: StoredPlan, files: Iterable[str] | None) -> StoredModel:
    """Return what a checkpoint holds for a model on the meta device; `files` are its weight files (None: not known).

    Raises CheckpointError for files that cannot be looked into, UnsupportedLayer for packed layers that would not be read.
    """
    parts, files = model_parts(model), list(files or ())
    if files and not any(str(file).endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{files[0]} is no safetensors file, and packed layers are read from those only; convert it: "
            "safetensors.torch.save_file(torch.load(...), ...)"
        )
    dtypes = stored_dtypes(files)
    keys = {name: key for key, name in names_in_memory(model, stored_names(files)).items()}
    scattered_layers = _scattered_layers(files, {key: name for name, key in keys.items()}, stored)
    sites = find_sites(model)
    stacks = _stacks(sites, keys)
    keys |= _keys_of_stacked(stacks, keys)
    names = disk_names(sites, keys)
    layers: dict[WeightSite, tuple[Scheme, Layout]] = {}
    kept = dict.fromkeys(other_matrices(model, parts, sites), "it is no layer of its own")
    for site in sites:
        own = names.get(site.name, site.name)
        inside = any(name.startswith(f"{path}.") for path in stored.blocks or (parts.blocks,) for name in (site.name, own))
        scheme = stored.scheme_of(own, inside)
        layout = None if scheme is None or scheme.weight is None else stored.layout_of(scheme).as_stored(dtypes)
        if scheme is not None and layout is not None and (not files or _is_packed(site, scheme, layout, keys)):
            layers[site] = scheme, _indexed(layout) if site.name in scattered_layers else layout
            continue
        if scheme is not None:
            logger.warning(
                f"{site.name} should have {scheme.name} by the checkpoint's config, but the file holds it as float: loaded so"
            )
        if parts.block_of(site.name) is not None or site.name == parts.head:
            kept[site.name] = "the checkpoint holds it as float"
    _refuse_unplanned(model, sites, layers, keys)
    _refuse_others(model, layers, keys)
    schemes = {site.name: scheme for site, (scheme, _) in layers.items()}
    plan = QuantPlan(stored.scheme, tuple(layers), schemes, kept, parts.blocks)
    packing = loaded_packing(layers.values(), stored.scheme)
    loaded = {scheme: layout_for(scheme.weight, packing) for scheme, _ in layers.values() if scheme.weight is not None}
    relayouts = {scheme: loaded[scheme] for scheme, layout in layers.values() if loaded[scheme].name != layout.name}
    config = AutoRoundFormat().config(plan, names | _names_apart(stacks, names), packing)
    biases = {site.name for site in layers if f"{site.name}.bias" in keys}
    return StoredModel(layers, biases, None if scattered_layers else config, {} if scattered_layers else relayouts, stacks)


def loaded_packing(layers: Iterable[tuple[Scheme, Layout]], base: Scheme) -> str:
    """Return the packing format that layers have once they are loaded: the file's, if auto_round has a name for it."""
    if base.weight is not None and base.weight.data_type != "int":
        return float_packing(base.weight)
    integers = {scheme.weight: layout for scheme, layout in layers if scheme.weight and scheme.weight.data_type == "int"}
    layouts = {layout.name: layout for layout in integers.values()}
    if len(layouts) == 1 and layouts.keys() <= {layout.name for layout in PACKING.values()}:
        return packing_format(*layouts.values())
    return "auto_round:auto_gptq" if all(weight.symmetric for weight in integers) else "auto_round"


def disk_names(sites: Iterable[WeightSite], keys: Mapping[str, str]) -> dict[str, str]:
    """Return layer name in memory -> in the files; `keys` maps tensor names in memory to those in the files."""
    found = {}
    for site in sites:
        for leaf in _WEIGHTS:
            if key := keys.get(f"{site.name}.{leaf}"):
                found[site.name] = key.rpartition(".")[0]
    return found


def _stacks(sites: Iterable[WeightSite], keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the stacks of experts that a file holds (names in memory) -> their layers, in order."""
    layers = {name.rpartition(".")[0] for name in keys}
    stacks: dict[str, list[str]] = {}
    for site in sites:
        stack, _ = expert_stack(site.name) or ("", 0)
        if stack in layers:
            stacks.setdefault(stack, []).append(site.name)
    return stacks


def _keys_of_stacked(stacks: Mapping[str, list[str]], keys: Mapping[str, str]) -> dict[str, str]:
    """Return name in memory of each expert's tensor -> the key of the stack's."""
    found = {}
    for name, key in keys.items():
        stack, _, leaf = name.rpartition(".")
        found |= {f"{layer}.{leaf}": key for layer in stacks.get(stack, ())}
    return found


def _names_apart(stacks: Mapping[str, list[str]], names: Mapping[str, str]) -> dict[str, str]:
    """Return what stacked layers, by name in memory, are called where the model is saved: there each has its own tensors."""
    return {layer: expert_apart(names[layer], layer) for layers in stacks.values() for layer in layers}


def _is_packed(site: WeightSite, scheme: Scheme, layout: Layout, keys: Mapping[str, str]) -> bool:
    """Return whether a file holds what a packed layer has besides a weight."""
    assert scheme.weight is not None
    return any(f"{site.name}.{leaf}" in keys for leaf in layout.empty(scheme.weight, site.shape) if leaf != "weight")


def _refuse_unplanned(
    model: PreTrainedModel, sites: Iterable[WeightSite], layers: Iterable[WeightSite], keys: Mapping[str, str]
) -> None:
    """Raise UnsupportedLayer if the file holds codes for a module that gets no packed layer: it would have random weights."""
    others = {name for name, _ in model.named_modules()} | {site.name for site in sites}
    others -= {site.name for site in layers}
    if found := sorted(key for name, key in keys.items() if name.endswith(_CODES) and name.rpartition(".")[0] in others):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UnsupportedLayer(
            f"the file holds {', '.join(found[:3])}{more}, and by the checkpoint's config these layers are not quantized, or not "
            "so: they would get random weights. Set right what quantization_config in its config.json says of them, or quantize "
            "the float model anew"
        )


def _refuse_others(model: PreTrainedModel, layers: Mapping[WeightSite, tuple[Scheme, Layout]], keys: Mapping[str, str]) -> None:
    """Raise UnsupportedLayer if anything else is packed and its codes are called as floats are: they would be loaded so."""
    marks: dict[str, str] = {}  # what a packed layer has besides a weight -> the layout
    for site, (scheme, layout) in layers.items():
        assert scheme.weight is not None
        tensors = layout.empty(scheme.weight, site.shape)
        marks |= {leaf: layout.name for leaf in tensors if "weight" in tensors and leaf != "weight"}
    others = {name for name, _ in model.named_parameters()} - {f"{site.name}.weight" for site in layers}
    for name in sorted(name.removesuffix(".weight") for name in others):
        if found := [layout for leaf, layout in marks.items() if f"{name}.{leaf}" in keys]:
            raise UnsupportedLayer(
                f"{name} is quantized in this {found[0]} checkpoint, and packed layers stand for linear ones of the decoder "
                "only; convert the model with that layer in 16 bits, or quantize the float model anew"
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
