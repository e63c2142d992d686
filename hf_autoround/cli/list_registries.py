# SPDX-License-Identifier: Apache-2.0
"""`hf-autoround list formats | schemes | backends`: what there is, read from the registries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

from hf_autoround.cli.parser import Parser
from hf_autoround.layers.sites import WeightSite
from hf_autoround.scheme import PRESETS, Scheme, TensorSpec, integer_scheme, resolve_scheme

if TYPE_CHECKING:
    from hf_autoround.backends import Backend
    from hf_autoround.formats import Format

_SITE = WeightSite("layer", "layer.weight", (4096, 4096))  # an ordinary layer


def run(words: Sequence[str]) -> int:
    """Print one registry."""
    flags = Parser(prog="hf-autoround list", description="List formats (with the schemes each stores), schemes or backends.")
    flags.add_argument("what", help="formats, schemes or backends")
    what = flags.parse_args(list(words)).what
    if what not in _LISTS:
        flags.unknown(what, _LISTS, "list")
    print(_LISTS[what]())
    return 0


def formats() -> str:
    """Return the formats, and which scheme each stores."""
    from hf_autoround.formats import FORMATS

    width = max(len(target.name) for target in FORMATS)
    lines = [f"{target.name:<{width}} {target.runtimes}" for target in FORMATS]
    lines += ["", f"{'scheme':<12} " + " ".join(f"{target.name:<{width}}" for target in FORMATS)]
    for scheme in _quantizing():
        cells = [_cell(target, scheme) for target in FORMATS]
        lines.append(f"{scheme.name:<12} " + " ".join(f"{cell:<{width}}" for cell in cells))
    some = [target for target in FORMATS if target.refuse(_SITE, integer_scheme(4, 64)) is None]
    few = ", ".join(target.name for target in some if target.refuse(_SITE, integer_scheme(4, 256)))
    lines += [
        "",
        f"sym: no asymmetric grid (--asym). Integers of any other group size (--group_size) go too, but not into {few}.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(target: Format, scheme: Scheme) -> str:
    """Return which of a scheme's grids a format stores."""
    if target.refuse(_SITE, scheme) is not None:
        return "-"
    integers = scheme.weight is not None and scheme.weight.data_type == "int"
    return "sym" if integers and target.refuse(_SITE, resolve_scheme(scheme, sym=False)) else "yes"


def schemes() -> str:
    """Return the presets with their numbers."""
    lines = [f"{'scheme':<12} {'numbers':<8} {'bits':>4} {'group':>8}  {'inputs':<24} bits per weight with scales"]
    for scheme in PRESETS:
        if scheme.weight is None:
            lines.append(f"{scheme.name:<12} {'float':<8} {16:>4} {'-':>8}  {'-':<24} 16 (leaves a layer as it is)")
            continue
        weight, stored = scheme.weight, _bits_per_weight(scheme)
        numbers = f"{scheme.name:<12} {weight.data_type:<8} {weight.bits:>4} {_size(weight):>8}"
        lines.append(f"{numbers}  {_inputs(scheme):<24} {stored:.3f}")
    return "\n".join(lines)


def _size(spec: TensorSpec) -> str:
    size = spec.group_size
    return "x".join(map(str, size)) if isinstance(size, list) else {0: "tensor", -1: "row"}.get(size, str(size))


def _inputs(scheme: Scheme) -> str:
    spec = scheme.activation
    if spec is None:
        return "-"
    return f"{spec.data_type}{spec.bits}, {'token' if _size(spec) == 'row' else _size(spec)}{'' if spec.dynamic else ', static'}"


def _bits_per_weight(scheme: Scheme) -> float:
    """Return what a layer of the ordinary size takes in format auto_round."""
    from hf_autoround.formats.auto_round import layout_for

    assert scheme.weight is not None
    tensors = layout_for(scheme.weight, "auto_round").empty(scheme.weight, _SITE.shape)
    return sum(8 * prod(shape) * dtype.itemsize for shape, dtype in tensors.values()) / prod(_SITE.shape)


def backends() -> str:
    """Return the backends in order of preference, each with what keeps it from running here."""
    from hf_autoround.backends import ALIASES, BACKENDS

    lines = []
    for backend in BACKENDS:
        reason = _why_not_here(backend)
        what = (type(backend).__doc__ or "").strip()
        lines.append(f"{backend.name:<24} {'here' if reason is None else '-':<5} {what}{f' ({reason})' if reason else ''}")
    names = "; ".join(f"{alias} is {' or '.join(names)}" for alias, names in ALIASES.items())
    return "\n".join([*lines, "", f"Other names: {names}."])


def _why_not_here(backend: Backend) -> str | None:
    """Return why a backend runs no ordinary layer on any device of this machine, or None."""
    import torch

    from hf_autoround.backends.base import missing
    from hf_autoround.layers.packed_linear import PackedLinear
    from hf_autoround.layouts import GPTQ_V1
    from hf_autoround.numerics import QuantizedTensor

    absent = missing(backend)
    if absent:
        return absent
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.insert(0, torch.accelerator.current_accelerator())
    reasons = []
    for scheme in (integer_scheme(4), integer_scheme(8, -1)):
        layer = PackedLinear((128, 128), scheme, GPTQ_V1, bias=False, dtype=torch.bfloat16)
        zeros = QuantizedTensor(torch.zeros(128, 1, 128, dtype=torch.int8), torch.ones(128, 1, 1, dtype=torch.float16))
        for name, tensor in GPTQ_V1.pack(zeros, layer.spec, 128).items():
            layer.get_parameter(name).data = tensor
        reasons += [backend.refuse(layer, device) for device in devices]
    return None if None in reasons else reasons[0]


def _quantizing() -> list[Scheme]:
    return [scheme for scheme in PRESETS if scheme.weight is not None]


_LISTS: dict[str, Callable[[], str]] = {"formats": formats, "schemes": schemes, "backends": backends}
