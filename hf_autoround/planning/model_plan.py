# SPDX-License-Identifier: Apache-2.0
"""The plan of a whole transformers model: which of its weights are sites at all, and what becomes of its output head."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hf_autoround.errors import AutoRoundError, UnsupportedLayer
from hf_autoround.layers.sites import WeightSite
from hf_autoround.models.blocks import ModelParts, find_sites, head_is_tied, other_matrices
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.planning.resolve import Refuse, matching, resolve_plan
from hf_autoround.scheme import Scheme, resolve_scheme


def plan_model(
    model: PreTrainedModel,
    parts: ModelParts,
    scheme: Scheme,
    *,
    name: str,
    layer_config: Mapping[str, Any] | str | None = None,
    ignore_layers: Iterable[str] = (),
    quant_lm_head: bool = False,
    refuse: Refuse = lambda site, scheme: {},
) -> QuantPlan:
    """Return the plan for a model (on the meta device is enough); `name` is what messages call it.

    Everything inside the blocks is quantized, the head only if `quant_lm_head` or `layer_config` says so.
    Raises UnsupportedLayer, UnsupportedScheme or UnknownName.
    """
    every = find_sites(model)
    inside = [site for site in every if parts.block_of(site.name) is not None]
    config = _layer_config(layer_config)
    head = [site for site in every if site.name == parts.head]
    in_config = parts.head in config and resolve_scheme(config[parts.head], base=scheme).weight is not None
    wanted = quant_lm_head or in_config
    if not wanted and parts.head is not None:
        config.pop(parts.head, None)  # 16 bits is what it has anyway
    if wanted:
        if not head:
            raise UnsupportedLayer(f"{name} has no output head that could be quantized; leave quant_lm_head out")
        if head_is_tied(model, head[0].name):
            raise UnsupportedLayer(
                f"{head[0].name} of {name} shares its weight with the input embedding, which stays float: it cannot be "
                "quantized; leave quant_lm_head out"
            )
    plan = resolve_plan(
        [*inside, *(head if wanted else [])],
        scheme,
        blocks=parts.blocks,
        head=parts.head if wanted else None,
        layer_config=config,
        ignore_layers=[key for key in ignore_layers if wanted or not _means_head_alone(key, parts, inside)],
        keep_float=list(other_matrices(model, parts, inside)),
        refuse=refuse,
    )
    outside = [site.name for site in every if parts.block_of(site.name) is None and site.name != parts.head]
    kept = {**plan.kept, **dict.fromkeys(outside, "it lies outside of the blocks")}
    if parts.head is not None and not wanted:
        kept[parts.head] = "quant_lm_head was not asked for"
    return replace(plan, kept=kept)


def _means_head_alone(key: str, parts: ModelParts, inside: list[WeightSite]) -> bool:
    """Say whether a key of `ignore_layers` means the head, which is ignored anyway, and nothing else."""
    return parts.head is not None and bool(matching(key, [parts.head])) and not matching(key, [site.name for site in inside])


def _layer_config(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError) as error:
            raise AutoRoundError(
                f"layer_config is no dict in Python's words: {given}; write it as {{'k_proj': {{'bits': 8}}}}, names in quotes"
            ) from error
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise AutoRoundError(f"layer_config is a {type(given).__name__}; it has to be a dict of layer name to scheme")
    return dict(given)
