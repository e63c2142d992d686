# SPDX-License-Identifier: Apache-2.0
"""The formats `mlx`, which mlx-lm runs (https://github.com/ml-explore/mlx-lm), and `auto_round:mlx`, the same tensors for
our own loader alone.

mlx-lm reads `quantization` in config.json: the base numbers, and under a layer's name what differs, or false. Beside it
stands `quantization_config` in auto_round's words, which mlx-lm passes over, so that transformers loads the same files. The
model's own settings are repeated under the names that they had before transformers 5: mlx-lm looks for most of them there and
takes its defaults in silence where it finds none.

The experts of a layer are one tensor there, `switch_mlp.gate_proj` and so on: most of mlx-lm's models put packed experts
together only from float ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats.auto_round import AutoRoundFormat
from hf_autoround.formats.base import Format, StoredPlan, StoredTensor, refuse_inputs
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import MLX
from hf_autoround.planning.fused import all_layers
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, Scheme, TensorSpec, integer_scheme

QUANTIZATION = "quantization"  # what mlx-lm calls its part of config.json
_LAYOUT = MLX()
_STACK = "switch_mlp"  # what most of mlx-lm's models call the experts of a layer
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])")
_RENAMED = {"gpt_neox.layers"}  # blocks that mlx-lm has other names for
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # mixtral's names for them


class AutoRoundMLXFormat(Format):
    """Symmetric integers in MLX's layout, `quant_method: auto-round`."""

    name = "auto_round:mlx"
    runtimes = "hf_autoround"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        assert scheme.weight is not None
        return refuse_inputs(scheme) or _LAYOUT.refuse(scheme.weight, site.shape)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return None: every layer may have its own scheme."""
        return None

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        return _LAYOUT.empty(_weight(plan.schemes[site.name]), site.shape)

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return name inside the layer -> tensor."""
        return _LAYOUT.pack(layer.tensor, _weight(plan.schemes[site.name]), layer.columns)

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the checkpoint calls them."""
        return AutoRoundFormat().config(plan, names, "mlx")

    def note(self, plan: QuantPlan) -> str | None:
        """Return which runtimes will not read this plan's checkpoint, or None."""
        return "auto_round:mlx: hf_autoround reads it, mlx-lm does not; mlx is what both read"


class MLXFormat(AutoRoundMLXFormat):
    """The same, with what mlx-lm needs to know."""

    name = "mlx"
    runtimes = "mlx-lm, hf_autoround"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        if site.transposed:
            return "mlx-lm turns the weights of a Conv1D when it loads them, and would turn packed ones"
        if site.fused_on_disk or (site.expert is not None and expert_stack(site.name) is None):
            return "mlx-lm has other names for the experts of a model whose checkpoint fuses them (auto_round:mlx keeps each)"
        return super().refuse(site, scheme)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return why schemes may not be mixed so, or None: what lies in one tensor has one scheme."""
        first: dict[str, str] = {}
        schemes = all_layers(plan)
        if plan.blocks in _RENAMED and len(set(plan.schemes.values())) > 1:
            return f"mlx-lm calls what lies in {plan.blocks} otherwise, and would not find the schemes of single layers"
        for name, scheme in schemes.items():
            stack, _ = expert_stack(name) or (name, 0)
            other = first.setdefault(stack, name)
            if scheme != schemes[other]:
                mixed = f"{name} has {scheme.name} and {other} {schemes[other].name}"
                return f"{mixed}, and it stores the experts of a layer in one tensor"
        return None

    def stack(self, name: str) -> tuple[str, int] | None:
        """Return the layer that holds an expert's tensors, and the expert's number; None for other layers."""
        return expert_stack(name)

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the source's checkpoint calls them."""
        return super().config(plan, _with_stacks(plan, names))

    def model_config(self, config: Mapping[str, Any], plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return the source's config.json with `quantization`, and with the settings' older names."""
        names = _with_stacks(plan, names)
        base = next(iter(plan.schemes.values())) if plan.scheme not in plan.schemes.values() else plan.scheme
        layers = {names.get(name, name): scheme for name, scheme in all_layers(plan).items()}
        differing = {name: _numbers(scheme) for name, scheme in sorted(layers.items()) if scheme != base}
        return {**_older_names(config), **config, QUANTIZATION: {**_numbers(base), "mode": "affine", **differing}}

    def note(self, plan: QuantPlan) -> str | None:
        """Return for which models mlx-lm (0.32) has another name for experts, if there are any; it fuses nothing."""
        if not any(expert_stack(site.name) for site in plan.sites):
            return None
        return "mlx: experts lie in switch_mlp, as mlx-lm calls them in all models but afmoe, dots1, gemma4, Klear and muse_spark"


def expert_stack(name: str) -> tuple[str, int] | None:
    """Return what mlx-lm calls the layer of all experts that a layer belongs to, and its number there; None for others."""
    found = _EXPERT.fullmatch(name)
    return (f"{found[1]}.{_STACK}.{_PROJECTIONS.get(found[3], found[3])}", int(found[2])) if found else None


def expert_apart(stack: str, layer: str) -> str:
    """Return what a file would call an expert's layer whose own name ends as `layer` does, and which lies in `stack` there."""
    _, *own = layer.rsplit(".", 3)
    return ".".join([stack.rpartition(f".{_STACK}.")[0], *own])


def _with_stacks(plan: QuantPlan, names: Mapping[str, str]) -> dict[str, str]:
    """Return layer name in memory -> in the file, for float experts too: mlx-lm puts those together itself."""
    own = {name: names.get(name, name) for name in all_layers(plan)}
    return {name: (expert_stack(key) or (key, 0))[0] for name, key in own.items()}


def read_mlx_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what an `mlx` configuration says, as mlx-lm writes it: biases may be any, so nothing is called symmetric.

    Raises UnsupportedScheme for numbers that we do not read.
    """
    layers = {name: value for name, value in config.items() if isinstance(value, Mapping)}
    for mode in (config.get("mode", "affine"), *(layer.get("mode", "affine") for layer in layers.values())):
        if mode != "affine":
            raise UnsupportedScheme(f"an MLX checkpoint of mode {mode!r} is not supported; there is affine")
    overrides = {name: integer_scheme(layer["bits"], layer["group_size"], sym=False) for name, layer in layers.items()}
    overrides |= {name: BF16 for name, value in config.items() if value is False and "." in name}
    return StoredPlan(lambda scheme: _LAYOUT, integer_scheme(config["bits"], config["group_size"], sym=False), overrides)


def _weight(scheme: Scheme) -> TensorSpec:
    assert scheme.weight is not None
    return scheme.weight


def _numbers(scheme: Scheme) -> Any:
    """Return a layer's entry in `quantization`."""
    return False if scheme.weight is None else {"group_size": scheme.weight.group_size, "bits": scheme.weight.bits}


def _older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json that transformers 5 renamed, under the names that mlx-lm reads."""
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    older = {
        "rope_theta": full.get("rope_theta"),
        "partial_rotary_factor": full.get("partial_rotary_factor"),
        "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta"),
        "sliding_window_pattern": config.get("_sliding_window_pattern"),
        "num_experts": config.get("num_local_experts"),
    }
    if full.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in full.items() if key not in older}
        older["rope_scaling"] = {**scaling, "type": full["rope_type"]}
    if config.get("model_type") == "gpt_neox":
        older |= {"rotary_emb_base": full.get("rope_theta"), "rotary_pct": full.get("partial_rotary_factor")}
    return {key: value for key, value in older.items() if value is not None}
