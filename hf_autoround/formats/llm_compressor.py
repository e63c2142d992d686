# SPDX-License-Identifier: Apache-2.0
"""The `llm_compressor` format: safetensors in compressed-tensors' layouts, as vLLM and transformers read them.

https://github.com/vllm-project/compressed-tensors. Codes are packed as they were trained: its own compressors would round
the weights a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_autoround import __version__
from hf_autoround.formats.base import (
    Format,
    StoredTensor,
    kept_names,
    packed_tensors,
    refuse_not_linear,
    refuse_ragged,
    stored_tensors,
)
from hf_autoround.formats.compressed_tensors import LAYOUTS, form_of, group_of, refuse_words
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.planning.fused import note_mixed
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import PerGroup, Scheme

QUANT_METHOD = "compressed-tensors"
_NEWER = {3, 5, 6, 7}  # bits whose codes compressed-tensors before 0.18 padded to whole words


class LLMCompressorFormat(Format):
    """Every data type but MXINT4, in groups of layers."""

    name = "llm_compressor"
    runtimes = "vLLM, SGLang, transformers (through compressed-tensors), hf_autoround"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        weight = scheme.weight
        assert weight is not None
        if reason := refuse_not_linear(site):
            return reason
        for spec in (weight, scheme.activation):
            if spec is not None and isinstance(spec.granularity, PerGroup) and site.shape[1] % spec.granularity.size:
                return f"its readers cut {spec.granularity.size} inputs at a time, and {site.shape[1]} is no multiple of that"
        return refuse_words(scheme) or (refuse_ragged(site) if weight.data_type == "int" else None)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return why a plan cannot be stored, or None."""
        outside = [site.name for site in plan.sites if not site.name.startswith(f"{plan.blocks}.")]
        return f"its readers keep {outside[0]} in 16 bits; leave quant_lm_head out" if outside else None

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        scheme = plan.schemes[site.name]
        return stored_tensors(LAYOUTS[form_of(scheme)], scheme, site.shape)

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return name inside the layer -> tensor."""
        return packed_tensors(LAYOUTS[form_of(layer.scheme)], layer)

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the checkpoint calls them."""
        layers: dict[Scheme, list[str]] = {}
        for name, scheme in plan.schemes.items():
            layers.setdefault(scheme, []).append(names.get(name, name))
        base = plan.scheme if plan.scheme in layers else next(iter(layers))
        layers[base] = ["Linear"]
        groups = [group_of(scheme, layers[scheme]) for scheme in (base, *(other for other in layers if other != base))]
        forms = {group["format"] for group in groups}
        return {
            "quant_method": QUANT_METHOD,
            "format": forms.pop() if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": kept_names(plan, names),
            "kv_cache_scheme": None,
            "provider": f"hf_autoround {__version__}",
        }

    def note(self, plan: QuantPlan) -> str | None:
        """Return which runtimes will not read this plan's checkpoint, or None."""
        notes = [note_mixed(plan)]
        packed = [scheme.weight for scheme in plan.schemes.values() if scheme.weight and form_of(scheme) == "pack-quantized"]
        if any(not weight.symmetric for weight in packed):
            notes.append(
                "llm_compressor, asymmetric: vLLM reads it, transformers up to 5.22 does, newer ones only with "
                "CompressedTensorsConfig(dequantize=True)"
            )
        if widths := sorted({weight.bits for weight in packed} & _NEWER):
            notes.append(f"llm_compressor at {', '.join(map(str, widths))} bits needs compressed-tensors 0.18 or newer")
        return "; ".join(filter(None, notes)) or None
