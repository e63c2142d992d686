# SPDX-License-Identifier: Apache-2.0
"""Reading compressed-tensors configurations: `pack-quantized` weights, nothing quantized at run time.

https://github.com/vllm-project/compressed-tensors. Groups of layers are given by targets: class names, full names, or
regular expressions after "re:"; the latter beat classes, `ignore` beats both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats.base import StoredPlan
from hf_autoround.layouts import PackQuantized
from hf_autoround.scheme import BF16, Scheme, resolve_scheme

_FORMAT = "pack-quantized"


def read_compressed_tensors_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what a `compressed-tensors` configuration says.

    Raises UnsupportedScheme for numbers that we do not read.
    """
    groups = config.get("config_groups") or {}
    if not groups:
        raise UnsupportedScheme("this compressed-tensors configuration has no config_groups: there is nothing quantized")
    by_class: Scheme | None = None
    overrides: dict[str, Scheme] = {}
    for name, group in groups.items():
        scheme = _scheme(name, group, config.get("format"))
        for target in group.get("targets") or ():
            if target == "Linear":
                by_class = scheme
            else:
                overrides[_pattern(target)] = scheme
    overrides |= {_pattern(name): BF16 for name in config.get("ignore") or ()}
    base = by_class or next(iter(overrides.values()))
    if by_class is None:  # only what is named
        overrides = {".": BF16, **overrides}
    return StoredPlan(lambda spec: PackQuantized(), base, overrides)


def _scheme(name: str, group: Mapping[str, Any], default: Any) -> Scheme:
    kind = group.get("format") or default
    if kind != _FORMAT:
        raise UnsupportedScheme(f"a compressed-tensors checkpoint in the form {kind!r} is not supported; there is {_FORMAT}")
    if group.get("input_activations"):
        raise UnsupportedScheme(f"{name} quantizes activations, which is not supported; weights alone can be quantized")
    weights = group["weights"]
    if weights.get("type", "int") != "int" or weights.get("actorder"):
        raise UnsupportedScheme(
            f"{name} has weights of type {weights.get('type')}, actorder {weights.get('actorder')}: not supported"
        )
    size = weights.get("group_size") if weights.get("strategy") == "group" else -1
    return resolve_scheme({"bits": weights["num_bits"], "group_size": size, "sym": weights.get("symmetric", True)})


def _pattern(target: str) -> str:
    return f"^(?:{target[3:]})" if target.startswith("re:") else f"^{re.escape(target)}$"
