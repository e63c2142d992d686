# SPDX-License-Identifier: Apache-2.0
"""Layers that inference engines fuse into one matrix: vLLM and SGLang load q/k/v, gate/up and a layer's experts so, and
give what they fused one scheme.

Names of vLLM 0.32 (`packed_modules_mapping` of its models); SGLang's are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, Scheme

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "w13": ("w1", "w3"),
}
_FUSED_INTO = {leaf: name for name, leaves in FUSED.items() for leaf in leaves}
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def fused_name(name: str) -> str:
    """Return an engine's name for the matrix that a layer becomes a part of; experts stay apart."""
    parent, dot, leaf = name.rpartition(".")
    return parent + dot + _FUSED_INTO.get(leaf, leaf)


def experts_module(name: str) -> str | None:
    """Return the module that holds the expert which a layer belongs to, or None."""
    expert = _EXPERT.match(name)
    return expert[1] if expert else None


def fused_units(layers: Mapping[str, Scheme]) -> dict[str, dict[str, Scheme]]:
    """Return an engine's name for a matrix -> the layers it is made of, with their schemes; every layer is in one."""
    units: dict[str, dict[str, Scheme]] = {}
    for name, scheme in layers.items():
        units.setdefault(experts_module(name) or fused_name(name), {})[name] = scheme
    return units


def all_layers(plan: QuantPlan) -> dict[str, Scheme]:
    """Return every layer that a plan knows, those that stay in 16 bits too."""
    return {**plan.schemes, **dict.fromkeys(plan.kept, BF16)}


def note_mixed(plan: QuantPlan) -> str | None:
    """Return a sentence about schemes that differ inside what engines fuse, or None."""
    units = fused_units(all_layers(plan))
    mixed = [members for members in units.values() if len(set(members.values())) > 1]
    if not mixed:
        return None
    by_scheme = {scheme.name: name for name, scheme in reversed(mixed[0].items())}
    example = ", ".join(f"{name} has {scheme}" for scheme, name in reversed(by_scheme.items()))
    more = f", and so in {len(mixed) - 1} more places" if len(mixed) > 1 else ""
    return (
        f"{example}{more}: vLLM and SGLang fuse q/k/v, gate/up and the experts of a layer and refuse mixed schemes there; "
        "give them one scheme to serve the checkpoint with these engines"
    )
