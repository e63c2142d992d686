# SPDX-License-Identifier: Apache-2.0
"""The words of compressed-tensors for schemes, and reading its configurations.

https://github.com/vllm-project/compressed-tensors. Groups of layers are given by targets: class names, full names, or
regular expressions after "re:"; the latter beat classes, `ignore` beats both. A group's form says where the numbers lie.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats.base import StoredPlan
from hf_autoround.layouts import FLOAT8_UPRIGHT, IntQuantized, Layout, Microscaled, NVFP4Packed, PackQuantized
from hf_autoround.numerics import refuse_scheme
from hf_autoround.scheme import (
    BF16,
    ActivationSpec,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    TensorSpec,
    resolve_scheme,
)

LAYOUTS: dict[str, Layout] = {
    "pack-quantized": PackQuantized(),
    "int-quantized": IntQuantized(),
    "mxfp4-pack-quantized": Microscaled(),
    "mxfp8-quantized": Microscaled(),
    "nvfp4-pack-quantized": NVFP4Packed(),
    "float-quantized": FLOAT8_UPRIGHT,
    "naive-quantized": FLOAT8_UPRIGHT,
}
# what tells kinds of floats apart, by our data type
_SCALES = {"mx_fp": {"scale_dtype": "torch.uint8"}, "nv_fp": {"scale_dtype": "torch.float8_e4m3fn"}, "fp": {}, "int": {}}


def form_of(scheme: Scheme) -> str:
    """Return the form that the layers of a scheme are written in."""
    weight = scheme.weight
    assert weight is not None
    if weight.data_type == "int":
        plain = scheme.activation is not None and LAYOUTS["int-quantized"].refuse(weight, (1, 1)) is None
        return "int-quantized" if plain else "pack-quantized"
    forms = {"mx_fp": "mxfp4-pack-quantized" if weight.bits == 4 else "mxfp8-quantized", "nv_fp": "nvfp4-pack-quantized"}
    return forms.get(weight.data_type, "float-quantized")


def refuse_words(scheme: Scheme) -> str | None:
    """Return why compressed-tensors has no words for a scheme, or None."""
    weight, inputs = scheme.weight, scheme.activation
    assert weight is not None
    if weight.data_type not in _SCALES:
        return f"compressed-tensors has no {weight.data_type}"
    if weight.data_type == "fp" and isinstance(weight.granularity, PerGroup):
        return "compressed-tensors' 8-bit floats have scales for tensors, rows or blocks, not for groups"
    if inputs is None:
        return None
    kind = "mx_fp" if inputs.data_type == "mx_fp_rceil" and inputs.bits == 8 else inputs.data_type  # where both are the same
    if kind not in _SCALES:
        return f"compressed-tensors does not round inputs as {inputs.data_type} does"
    if (kind == "nv_fp") != (weight.data_type == "nv_fp"):
        return f"compressed-tensors does not mix {weight.data_type} weights with {kind} inputs"
    return None


def group_of(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """Return the entry of `config_groups` for the layers that `targets` name."""
    assert scheme.weight is not None
    inputs = None if scheme.activation is None else _words(scheme.activation)
    return {
        "targets": targets,
        "format": form_of(scheme),
        "weights": _words(scheme.weight),
        "input_activations": inputs,
        "output_activations": None,
    }


def _words(spec: TensorSpec) -> dict[str, Any]:
    data_type = spec.data_type.removesuffix("_rceil")
    words = {"num_bits": spec.bits, "type": "int" if data_type == "int" else "float", "symmetric": spec.symmetric}
    match spec.granularity:
        case PerTensor():
            words["strategy"] = "tensor"
        case PerChannel():
            words["strategy"] = "token" if isinstance(spec, ActivationSpec) else "channel"
        case PerGroup(size):
            words |= {"strategy": "tensor_group" if data_type == "nv_fp" else "group", "group_size": size}
        case PerBlock(rows, columns):
            words |= {"strategy": "block", "block_structure": [rows, columns]}
    dynamic: bool | str = isinstance(spec, ActivationSpec) and spec.dynamic
    return words | _SCALES[data_type] | {"dynamic": "local" if dynamic and data_type == "nv_fp" else dynamic}


def read_compressed_tensors_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what a `compressed-tensors` configuration says.

    Raises UnsupportedScheme for numbers that we do not read.
    """
    groups = config.get("config_groups") or {}
    if not groups:
        raise UnsupportedScheme("this compressed-tensors configuration has no config_groups: there is nothing quantized")
    by_class: Scheme | None = None
    overrides: dict[str, Scheme] = {}
    layouts: dict[Scheme, Layout] = {}
    for name, group in groups.items():
        form = group.get("format") or config.get("format")
        if form not in LAYOUTS:
            raise UnsupportedScheme(
                f"a compressed-tensors checkpoint in the form {form!r} is not supported; there are {', '.join(LAYOUTS)}"
            )
        scheme = _scheme(name, group)
        layouts[scheme] = LAYOUTS[form]
        for target in group.get("targets") or ():
            if target == "Linear":
                by_class = scheme
            else:
                overrides[_pattern(target)] = scheme
    overrides |= {_pattern(name): BF16 for name in config.get("ignore") or ()}
    base = by_class or next(iter(overrides.values()))
    if by_class is None:  # only what is named
        overrides = {".": BF16, **overrides}
    return StoredPlan(layouts.__getitem__, base, overrides)


def _scheme(name: str, group: Mapping[str, Any]) -> Scheme:
    numbers = _numbers(name, group["weights"])
    inputs = group.get("input_activations")
    if inputs:
        numbers |= {f"act_{key}": value for key, value in _numbers(name, inputs).items()}
        numbers["act_dynamic"] = bool(inputs.get("dynamic", False))
    scheme = resolve_scheme(numbers)
    if reason := refuse_scheme(scheme):
        raise UnsupportedScheme(f"{name} is not supported: {reason}")
    return scheme


def _numbers(name: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a scheme that compressed-tensors' words for one tensor mean."""
    if words.get("actorder"):
        raise UnsupportedScheme(f"{name} has actorder {words['actorder']}, which is not supported")
    data_type = "int"
    if words.get("type", "int") == "float":
        scales = str(words.get("scale_dtype"))
        data_type = next((kind for kind, marks in _SCALES.items() if scales in marks.values()), "fp")
    strategy = words.get("strategy")
    size = {"tensor": 0, "channel": -1, "token": -1, "block": words.get("block_structure")}.get(strategy, words.get("group_size"))
    return {"data_type": data_type, "bits": words["num_bits"], "group_size": size, "sym": words.get("symmetric", True)}


def _pattern(target: str) -> str:
    return f"^(?:{target[3:]})" if target.startswith("re:") else f"^{re.escape(target)}$"
