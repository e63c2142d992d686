# SPDX-License-Identifier: Apache-2.0
"""`hf-autoround list formats | schemes | backends`: what there is, read from the registries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hf_autoround.cli.parser import Parser
from hf_autoround.layers.sites import WeightSite
from hf_autoround.scheme import PRESETS, Scheme

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

    lines = [f"{target.name:<12} {target.runtimes}" for target in FORMATS]
    lines += ["", f"{'scheme':<12} " + " ".join(f"{target.name:<12}" for target in FORMATS)]
    for scheme in _quantizing():
        cells = ["yes" if target.refuse(_SITE, scheme) is None else "-" for target in FORMATS]
        lines.append(f"{scheme.name:<12} " + " ".join(f"{cell:<12}" for cell in cells))
    lines += ["", "Asymmetric grids (--asym) and any other group size (--group_size) can be stored wherever the scheme can."]
    return "\n".join(line.rstrip() for line in lines)


def schemes() -> str:
    """Return the presets with their numbers."""
    lines = [f"{'scheme':<12} {'bits':>4} {'group':>6}  bits per weight with scales"]
    for scheme in PRESETS:
        if scheme.weight is None:
            lines.append(f"{scheme.name:<12} {16:>4} {'-':>6}  16 (leaves a layer as it is)")
            continue
        bits, size = scheme.weight.bits, scheme.weight.group_size
        lines.append(f"{scheme.name:<12} {bits:>4} {size:>6}  {bits + (16 + bits) / size:.3f}")
    return "\n".join(lines)


def backends() -> str:
    """Return the backends in order of preference."""
    from hf_autoround.backends import BACKENDS

    return "\n".join(f"{backend.name:<24} {(type(backend).__doc__ or '').strip()}" for backend in BACKENDS)


def _quantizing() -> list[Scheme]:
    return [scheme for scheme in PRESETS if scheme.weight is not None]


_LISTS: dict[str, Callable[[], str]] = {"formats": formats, "schemes": schemes, "backends": backends}
