# SPDX-License-Identifier: Apache-2.0
"""The `auto_awq` format: safetensors in AWQ's "gemm" layout, `quant_method: awq`, as AutoAWQ wrote and gptqmodel reads it.

https://github.com/casper-hansen/AutoAWQ. One scheme of 4 bits for all layers; `modules_to_not_convert` names those in 16
bits. transformers matches its entries with the start or the end of a layer's name, vLLM with any part: full names mean the
same to both. gptqmodel does not look there but for `dynamic` (and would load such layers with random weights).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_autoround import __version__
from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats.base import (
    Format,
    StoredPlan,
    StoredTensor,
    kept_names,
    refuse_inputs,
    refuse_ragged,
    stored_blocks,
)
from hf_autoround.formats.dynamic import dynamic_rules, read_dynamic
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import AWQ
from hf_autoround.planning.fused import note_mixed
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, Scheme, TensorSpec, resolve_scheme

QUANT_METHOD = "awq"
_LAYOUT = AWQ()


class AutoAWQFormat(Format):
    """Integers of 4 bits, one scheme for all layers."""

    name = "auto_awq"
    runtimes = "vLLM, SGLang, gptqmodel, transformers (through gptqmodel), hf_autoround"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        assert scheme.weight is not None
        return refuse_inputs(scheme) or _LAYOUT.refuse(scheme.weight, site.shape) or refuse_ragged(site)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return why a plan cannot be stored, or None."""
        by_scheme = {scheme.name: name for name, scheme in reversed(plan.schemes.items())}
        if len(by_scheme) == 1:
            return None
        examples = ", ".join(f"{name} has {scheme}" for scheme, name in reversed(by_scheme.items()))
        return f"it stores one scheme for all layers, and here {examples}; auto_round and auto_gptq store mixed schemes"

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        return _LAYOUT.empty(_weight(plan), site.shape)

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return name inside the layer -> tensor."""
        return _LAYOUT.pack(layer.tensor, _weight(plan), layer.columns)

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the checkpoint calls them."""
        weight, base = _weight(plan), next(iter(plan.schemes.values()))
        kept = dict.fromkeys(kept_names(plan, names), BF16)
        rules = dynamic_rules({name: scheme for name, scheme in kept.items() if name.startswith(f"{plan.blocks}.")}, base)
        heads = [name for name in plan.schemes if not name.startswith(f"{plan.blocks}.")]
        return {
            "quant_method": QUANT_METHOD,
            "version": "gemm",
            "bits": weight.bits,
            "group_size": weight.group_size,
            "sym": weight.symmetric,
            "zero_point": not weight.symmetric,
            "modules_to_not_convert": list(kept),
            "block_name_to_quantize": plan.blocks,
            "provider": f"hf_autoround {__version__}",
            **({"lm_head": True} if heads else {}),
            **({"dynamic": rules} if rules else {}),
        }

    def note(self, plan: QuantPlan) -> str | None:
        """Return which runtimes will not read this plan's checkpoint well, or None."""
        notes = [note_mixed(plan)]
        if _weight(plan).symmetric:
            notes.append("auto_awq, symmetric: vLLM's fast GPU kernels take auto_round or auto_gptq, or auto_awq with sym=False")
        return "; ".join(filter(None, notes)) or None


def read_awq_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what an `awq` configuration says.

    Raises UnsupportedScheme for numbers or layouts that we do not read.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    version = "llm-awq" if config.get("backend") == "llm-awq" else version
    if version != "gemm":
        raise UnsupportedScheme(f"an AWQ checkpoint of version {version!r} is not supported; there is gemm")
    numbers = {
        "bits": config.get("w_bit", 4),
        "group_size": config.get("q_group_size", 128),
        "sym": not config.get("zero_point", True),
    }
    scheme = _scheme(config, resolve_scheme(numbers))
    overrides = dict(reversed(read_dynamic(config, lambda rule: _scheme(rule, scheme)).items()))
    overrides |= {_skipped(key): BF16 for key in config.get("modules_to_not_convert") or ()}
    if config.get("lm_head"):
        overrides["lm_head"] = scheme
    return StoredPlan(lambda scheme: _LAYOUT, scheme, overrides, stored_blocks(config))


def _scheme(config: Mapping[str, Any], base: Scheme) -> Scheme:
    scheme = resolve_scheme({key: config[key] for key in ("bits", "group_size") if config.get(key) is not None}, base=base)
    bits = scheme.to_dict()["bits"]
    if bits != 4:
        raise UnsupportedScheme(f"an AWQ checkpoint with layers of {bits} bits is not supported; there are 4")
    return scheme


def _skipped(key: str) -> str:
    """Return a regular expression for an entry of `modules_to_not_convert`, as transformers reads it: the start of a name
    up to a dot or its end, itself a regular expression there, or any name's ending."""
    try:
        re.compile(key)
    except re.error as error:
        raise UnsupportedScheme(f"{key!r} in modules_to_not_convert is no regular expression: {error}") from error
    return rf"^(?:{key})(?:(?<=\.)|(?=\.|$))|(?:{re.escape(key)})$"


def _weight(plan: QuantPlan) -> TensorSpec:
    """Return the numbers that all layers share."""
    weight = next(iter(plan.schemes.values())).weight
    assert weight is not None
    return weight
