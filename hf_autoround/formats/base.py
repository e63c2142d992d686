# SPDX-License-Identifier: Apache-2.0
"""What a format is, and what reading one gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_autoround.layers.activations import input_tensors
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import Layout
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.planning.resolve import matching
from hf_autoround.scheme import Scheme

StoredTensor = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor in a file


class Format(Protocol):
    """A kind of checkpoint. It may refuse a site, or how a plan mixes schemes; it never changes a plan."""

    name: str
    runtimes: str  # what reads it, for people

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None: ...
    def refuse_plan(self, plan: QuantPlan) -> str | None: ...
    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]: ...
    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]: ...
    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any] | None: ...
    def note(self, plan: QuantPlan) -> str | None: ...

    def stack(self, name: str) -> tuple[str, int] | None:
        """Return the layer whose tensors hold those of `name`, a layer of the source's checkpoint, and at which place; None if
        it has its own."""
        return None

    def model_config(self, config: Mapping[str, Any], plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return what config.json says of the model itself: what the source's said, unless the format's readers need more."""
        return dict(config)


def stored_tensors(layout: Layout, scheme: Scheme, shape: tuple[int, int]) -> dict[str, StoredTensor]:
    """Return name inside a layer (O, I) -> (shape, dtype) of all that it holds but a bias."""
    assert scheme.weight is not None
    return layout.empty(scheme.weight, shape) | input_tensors(scheme)


def packed_tensors(layout: Layout, layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return name inside a layer -> tensor of all that it holds but a bias."""
    assert layer.scheme.weight is not None
    inputs = {name: layer.static for name in input_tensors(layer.scheme) if layer.static is not None}
    return layout.pack(layer.tensor, layer.scheme.weight, layer.columns) | inputs


_MULTIPLE = 32


def refuse_inputs(scheme: Scheme) -> str | None:
    """Return why a format for weights alone cannot store a scheme, or None."""
    return None if scheme.activation is None else "it stores weights alone, and nothing would quantize the inputs"


def refuse_ragged(site: WeightSite) -> str | None:
    """Return why integer kernels would not take a site's shape, or None: they read whole words of codes both ways."""
    if any(size % _MULTIPLE for size in site.shape):
        return f"its shape {site.shape} is not a multiple of {_MULTIPLE} both ways"
    return None


def refuse_not_linear(site: WeightSite) -> str | None:
    """Return why readers that look for a `Linear` of a site's name would find none, or None."""
    if site.fused_on_disk:
        return "its readers take every expert's own weight, and the checkpoint fuses them"
    return "its readers take a Linear, and it is a Conv1D" if site.transposed else None


def kept_names(plan: QuantPlan, names: Mapping[str, str]) -> list[str]:
    """Return what stays in 16 bits as the checkpoint calls it, and as the model does where that is another name."""
    return sorted({*plan.kept, *(names.get(name, name) for name in plan.kept)})


def stored_blocks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of the quantized lists of blocks that a configuration names."""
    blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or ()
    return tuple(blocks.replace(" ", "").split(",")) if isinstance(blocks, str) else tuple(blocks)


LayoutOf = Callable[[Scheme], Layout]


@dataclass(frozen=True)
class StoredPlan:
    """What a checkpoint's configuration says: the layout of each scheme, the base scheme, and what differs by name or
    pattern.

    `blocks` are the paths of the quantized lists of blocks; empty means wherever the decoder blocks are.
    """

    layout_of: LayoutOf
    scheme: Scheme
    overrides: Mapping[str, Scheme]
    blocks: tuple[str, ...] = ()

    def scheme_of(self, name: str, inside_blocks: bool) -> Scheme | None:
        """Return the scheme of a layer, None if it is not quantized. Exact names beat patterns, later ones earlier ones."""
        chosen = self.overrides.get(name)
        if chosen is None:
            for key in reversed(self.overrides):
                if matching(key, [name]):
                    chosen = self.overrides[key]
                    break
        if chosen is None and inside_blocks:
            chosen = self.scheme
        return chosen if chosen is not None and chosen.weight is not None else None
