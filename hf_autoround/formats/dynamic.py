# SPDX-License-Identifier: Apache-2.0
"""gptqmodel's `dynamic`: what differs from a checkpoint's base scheme, by regular expressions over layer names.

A rule matches from the start of a name and the first that matches decides: "+:" (or no sign) gives other numbers, "-:"
leaves a layer in 16 bits. gptqmodel and vLLM read it; transformers ignores it.
https://github.com/ModelCloud/GPTQModel#dynamic-quantization-per-module-quantizeconfig-override
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hf_autoround.errors import UnsupportedScheme
from hf_autoround.planning.fused import FUSED, fused_units
from hf_autoround.scheme import BF16, Scheme

Rules = dict[str, dict[str, Any]]


def numbers(scheme: Scheme) -> dict[str, Any]:
    """Return bits, group_size and sym, as GPTQ configurations write them."""
    return {key: value for key, value in scheme.to_dict().items() if key != "data_type"}


def dynamic_rules(layers: Mapping[str, Scheme], base: Scheme) -> Rules:
    """Return the rules for layers that do not have the base scheme.

    Where layers that engines fuse have one scheme, their rule matches the fused name too: vLLM looks for nothing else.
    """
    rules: Rules = {}
    for unit, members in fused_units(layers).items():
        if len(set(members.values())) == 1:
            rules |= _rule(_unit_pattern(unit, members), next(iter(members.values())), base)
        else:
            for name, scheme in members.items():
                rules |= _rule(re.escape(name), scheme, base)
    return rules


def read_dynamic(config: Mapping[str, Any], scheme_of: Callable[[Mapping[str, Any]], Scheme]) -> dict[str, Scheme]:
    """Return regular expression -> scheme, the first that matches deciding; `scheme_of` reads a rule's numbers.

    Raises UnsupportedScheme.
    """
    return {
        _anchored(key): BF16 if key.startswith("-:") else scheme_of(value) for key, value in (config.get("dynamic") or {}).items()
    }


def _rule(pattern: str, scheme: Scheme, base: Scheme) -> Rules:
    if scheme == base:
        return {}
    return {f"-:^{pattern}$": {}} if scheme.weight is None else {f"+:^{pattern}$": numbers(scheme)}


def _unit_pattern(unit: str, members: Mapping[str, Scheme]) -> str:
    parent, _, leaf = unit.rpartition(".")
    if unit in members:
        return re.escape(unit)
    if leaf in FUSED:
        return rf"{re.escape(parent)}\.({'|'.join([*(name.rpartition('.')[2] for name in members), leaf])})"
    return rf"{re.escape(unit)}(\..+)?"  # experts


def _anchored(key: str) -> str:
    pattern = f"^(?:{key[2:] if key.startswith(('+:', '-:')) else key})"
    try:
        re.compile(pattern)
    except re.error as error:
        raise UnsupportedScheme(f"the rule {key!r} of `dynamic` is no regular expression: {error}") from error
    return pattern
