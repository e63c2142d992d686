# SPDX-License-Identifier: Apache-2.0
"""The `auto_gptq` format: safetensors in GPTQ layout, `quant_method: gptq`, as gptqmodel writes and reads it.

https://github.com/ModelCloud/GPTQModel. Symmetric plans are written as version 1, which everything reads. A plan with an
asymmetric layer is written as version 2 (`checkpoint_format: gptq_v2`, zero points stored plainly): gptqmodel refuses
asymmetric version 1 files of other tools, because many of those tools wrapped zero points wrongly.

What differs from the base scheme goes into `dynamic`. transformers' own reader ignores that; which layers are left in 16
bits it learns from `modules_in_block_to_quantize`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_autoround import __version__
from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats.base import Format, StoredPlan, StoredTensor, refuse_inputs, refuse_ragged, stored_blocks
from hf_autoround.formats.dynamic import dynamic_rules, numbers, read_dynamic
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import GPTQ_V1, GPTQ_V2, IndexedGPTQ, Layout
from hf_autoround.planning.fused import all_layers, note_mixed
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, Scheme, TensorSpec, resolve_scheme

QUANT_METHOD = "gptq"
_BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": GPTQ_V1, "gptq_v2": GPTQ_V2}
_HEADS = ("lm_head", "embed_out")  # what `lm_head: true` means, by the names that models give it


class AutoGPTQFormat(Format):
    """Integers of 2, 3, 4 and 8 bits."""

    name = "auto_gptq"
    runtimes = "gptqmodel, transformers (through gptqmodel), hf_autoround; vLLM and SGLang at symmetric 4 and 8 bits"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        assert scheme.weight is not None
        if scheme.activation is not None:
            return refuse_inputs(scheme)
        if scheme.weight.bits not in _BITS:
            return f"it stores 2, 3, 4 or 8 bits, not {scheme.weight.bits}"
        return refuse_ragged(site) or GPTQ_V1.refuse(scheme.weight, site.shape)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return None: every layer may have its own scheme."""
        return None

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        return _layout(plan).empty(_weight(plan, site), site.shape)

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return name inside the layer -> tensor."""
        return _layout(plan).pack(layer.tensor, _weight(plan, site), layer.columns)

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the checkpoint calls them."""
        base = _base(plan)
        layers = {names.get(name, name): scheme for name, scheme in all_layers(plan).items()}
        inside = {name: scheme for name, scheme in layers.items() if name.startswith(f"{plan.blocks}.")}
        heads = {name: scheme for name, scheme in layers.items() if name not in inside and scheme.weight is not None}
        assert base.weight is not None
        config = {
            "quant_method": QUANT_METHOD,
            "checkpoint_format": _version(plan),
            **numbers(base),
            "desc_act": False,
            "true_sequential": False,
            "damp_percent": 0.01,  # transformers wants a number here
            "lm_head": bool(heads),
            "block_name_to_quantize": plan.blocks,
            "provider": f"hf_autoround {__version__}",
        }
        rules = dynamic_rules({**inside, **heads}, base)
        listed = _listed(plan.blocks, inside, heads)
        return config | ({"dynamic": rules} if rules else {}) | ({"modules_in_block_to_quantize": [listed]} if listed else {})

    def note(self, plan: QuantPlan) -> str | None:
        """Return which runtimes will not read this plan's checkpoint, or None."""
        weights = [scheme.weight for scheme in plan.schemes.values() if scheme.weight is not None]
        notes = []
        if any(not weight.symmetric for weight in weights):
            notes.append("auto_gptq, asymmetric: gptqmodel and transformers read it, vLLM and SGLang do not (auto_awq they do)")
        elif any(weight.bits not in (4, 8) for weight in weights):
            notes.append("auto_gptq at 2 or 3 bits: gptqmodel and transformers read it, vLLM and SGLang do not")
        if len(set(weights)) > 1:
            notes.append("auto_gptq with mixed schemes: transformers needs hf_autoround to read it, gptqmodel reads it")
        mixed = note_mixed(plan)
        return "; ".join([*notes, *([mixed] if mixed else [])]) or None


def read_gptq_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what a `gptq` configuration says.

    Raises UnsupportedScheme for numbers or layouts that we do not read.
    """
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    version = "marlin" if config.get("is_marlin_format") else version
    if version not in _VERSIONS:
        raise UnsupportedScheme(f"a GPTQ checkpoint of format {version!r} is not supported; there are {', '.join(_VERSIONS)}")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise UnsupportedScheme(f"pack_dtype {config['pack_dtype']!r} is not supported; codes lie in int32 words")
    scheme = _scheme(config)
    rules = read_dynamic(config, lambda rule: _scheme(rule, scheme))
    overrides = dict(reversed(rules.items()))
    if listed := _flat(config.get("modules_in_block_to_quantize") or ()):
        endings = "|".join(re.escape(name) for name in listed)
        overrides[rf"^(?!(?:.*\.)?(?:{endings})$)"] = BF16
    for head in _HEADS:
        first = next((chosen for pattern, chosen in rules.items() if re.match(pattern, head)), scheme)
        overrides[head] = first if config.get("lm_head") else BF16
    return StoredPlan(lambda scheme: _VERSIONS[version], scheme, overrides, stored_blocks(config))


def _scheme(config: Mapping[str, Any], base: Scheme | None = None) -> Scheme:
    given = {key: config[key] for key in ("bits", "group_size", "sym") if config.get(key) is not None}
    scheme = resolve_scheme(given, base=base)
    if scheme.weight is not None and scheme.weight.bits not in _BITS:
        raise UnsupportedScheme(f"a GPTQ checkpoint of {scheme.weight.bits} bits is not supported; there are 2, 3, 4 and 8")
    return scheme


def _flat(listed: Any) -> list[str]:
    return [listed] if isinstance(listed, str) else [name for part in listed for name in _flat(part)]


def _weight(plan: QuantPlan, site: WeightSite) -> TensorSpec:
    weight = plan.schemes[site.name].weight
    assert weight is not None
    return weight


def _version(plan: QuantPlan) -> str:
    return "gptq" if all(scheme.weight is None or scheme.weight.symmetric for scheme in plan.schemes.values()) else "gptq_v2"


def _layout(plan: QuantPlan) -> Layout:
    """Return the layout with `g_idx`: gptqmodel's layers have that tensor and complain where a file has none."""
    return IndexedGPTQ(_VERSIONS[_version(plan)])


def _base(plan: QuantPlan) -> Scheme:
    """Return the scheme that the file calls its own: the plan's, unless no layer has it."""
    used = list(plan.schemes.values())
    return plan.scheme if plan.scheme in used else used[0]


def _listed(blocks: str, inside: Mapping[str, Scheme], heads: Mapping[str, Scheme]) -> list[str]:
    """Return `modules_in_block_to_quantize`: endings of names, where a layer stays in 16 bits; nothing for models with
    experts, which its readers do not look up there."""
    if all(scheme.weight is not None for scheme in inside.values()) or any(".experts." in name for name in inside):
        return []
    endings = {name: name.removeprefix(f"{blocks}.").partition(".")[2] for name in inside}
    partly = {endings[name] for name, scheme in inside.items() if scheme.weight is None}
    listed = [name if endings[name] in partly else endings[name] for name, scheme in inside.items() if scheme.weight is not None]
    return sorted({*listed, *heads})
