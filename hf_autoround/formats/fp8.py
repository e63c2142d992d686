# SPDX-License-Identifier: Apache-2.0
"""The `fp8` format: 8-bit floats with a scale for each block of 128 x 128, `quant_method: fp8`, as DeepSeek publishes them.

https://huggingface.co/docs/transformers/quantization/finegrained_fp8. On a CPU transformers dequantizes them when it loads,
and takes a block's size from the shapes: what is larger than a block has to be whole blocks.
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
    packed_tensors,
    refuse_not_linear,
    stored_tensors,
)
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import FLOAT8
from hf_autoround.planning.fused import experts_module, note_mixed
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, Scheme, resolve_scheme

QUANT_METHOD = "fp8"
_BLOCK = 128
_SCHEME = resolve_scheme("FP8_BLOCK")


class FP8Format(Format):
    """FP8_BLOCK, for all layers that are quantized."""

    name = "fp8"
    runtimes = "vLLM, SGLang, transformers, hf_autoround"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        if scheme != _SCHEME:
            return f"it stores {_SCHEME.name}, not {scheme.name}"
        if any(size > _BLOCK and size % _BLOCK for size in site.shape):
            return f"its shape {site.shape} is not whole blocks of {_BLOCK} both ways"
        return refuse_not_linear(site)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return why a plan cannot be stored, or None: transformers converts all experts of a layer or none."""
        converted = {experts_module(site.name) for site in plan.sites} - {None}
        both = [name for name in sorted(plan.kept) if experts_module(name) in converted]
        return f"its readers quantize the experts of a layer together, and {both[0]} would stay in 16 bits" if both else None

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        return stored_tensors(FLOAT8, _SCHEME, site.shape)

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return name inside the layer -> tensor."""
        return packed_tensors(FLOAT8, layer)

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the checkpoint calls them."""
        kept = kept_names(plan, names)
        experts = {module for name in kept if (module := experts_module(name))}
        return {
            "quant_method": QUANT_METHOD,
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": sorted({*kept, *experts}),
            "provider": f"hf_autoround {__version__}",
        }

    def note(self, plan: QuantPlan) -> str | None:
        """Return which runtimes will not read this plan's checkpoint well, or None."""
        return note_mixed(plan)


def read_fp8_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what an `fp8` configuration says.

    Raises UnsupportedScheme for numbers that we do not read.
    """
    block, inputs = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if not block or inputs != "dynamic":
        raise UnsupportedScheme(
            f"an fp8 checkpoint with weight_block_size {block} and {inputs} inputs is a source: quantize it from its files, "
            "with AutoRound(...) or hf-autoround"
        )
    scheme = resolve_scheme(_SCHEME, group_size=block, act_group_size=block[1])
    kept = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    # the start of a name up to a dot, or its end
    overrides = {rf"^{re.escape(name)}(\.|$)|(^|\.){re.escape(name)}$": BF16 for name in kept}
    return StoredPlan(lambda scheme: FLOAT8, scheme, overrides)
