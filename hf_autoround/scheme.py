# SPDX-License-Identifier: Apache-2.0
"""Schemes: what a layer's numbers become. Which layer gets which is a plan; how the bytes lie is a layout.

The preset names are the ones the field uses: W4A16 is 4-bit weights, 16-bit activations, groups of 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_autoround.errors import UnsupportedScheme
from hf_autoround.registry import find, suggest


@dataclass(frozen=True)
class PerChannel:
    """One scale for each row of the weight (written `group_size=-1`)."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` consecutive inputs of a row; a shorter last group is padded."""

    size: int


Granularity = PerChannel | PerGroup


@dataclass(frozen=True)
class TensorSpec:
    """The numbers of one tensor: the data type's name, its bits, what shares a scale, and whether zero is in the middle."""

    data_type: str
    bits: int
    granularity: Granularity
    symmetric: bool

    @property
    def group_size(self) -> int:
        """The group size as configuration files write it: -1 is one group per row."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else -1


@dataclass(frozen=True)
class Scheme:
    """A named choice for the weights of a layer; `weight=None` leaves the layer in 16 bits."""

    name: str
    weight: TensorSpec | None

    def to_dict(self) -> dict[str, Any]:
        """Return the scheme with the key names of a checkpoint's `extra_config`.

        All of them for 16 bits too, as vLLM fills them in: it compares the entries of what it fuses key by key.
        """
        if self.weight is None:
            return {"bits": 16, "group_size": -1, "sym": True, "data_type": "float"}
        weight = self.weight
        return {"bits": weight.bits, "group_size": weight.group_size, "sym": weight.symmetric, "data_type": weight.data_type}


def integer_scheme(bits: int, group_size: int = 128, sym: bool = True) -> Scheme:
    """Return the integer scheme of these numbers, named as the presets are: W2A16G64, W4A16-asym, W8A16G-1."""
    suffix = "" if group_size == 128 else f"G{group_size}"
    granularity = PerChannel() if group_size == -1 else PerGroup(group_size)
    name = f"W{bits}A16{suffix}{'' if sym else '-asym'}"
    return Scheme(name, TensorSpec("int", bits, granularity, sym))


BF16 = Scheme("BF16", None)

# To add one: a line here. Names are upper case; a user may write them in any case.
PRESETS: tuple[Scheme, ...] = (
    *(integer_scheme(bits) for bits in range(2, 9)),
    *(integer_scheme(bits, size) for size in (64, 32) for bits in range(2, 9)),
    BF16,
)

_KEYS = ("bits", "group_size", "sym", "data_type")
SchemeLike = Scheme | str | Mapping[str, Any]


def resolve_scheme(scheme: SchemeLike, base: Scheme | None = None, **overrides: Any) -> Scheme:
    """Return the scheme that a user means.

    `scheme` is a preset name, a Scheme, or a dict with any of bits, group_size, sym, data_type and `scheme` (a preset to
    start from); what a dict leaves out comes from `base`. `overrides` are the same keys, those that are None left alone.
    16 bits mean "leave it in 16 bits".

    Raises UnsupportedScheme or UnknownName.
    """
    if isinstance(scheme, str):
        resolved = find(PRESETS, scheme.strip().upper(), kind="scheme")
        given: dict[str, Any] = {}
    elif isinstance(scheme, Scheme):
        resolved, given = scheme, {}
    elif isinstance(scheme, Mapping):
        given = dict(scheme)
        start = given.pop("scheme", None)
        resolved = resolve_scheme(start) if start is not None else base or find(PRESETS, "W4A16", kind="scheme")
    else:
        raise UnsupportedScheme(f"a scheme is a name, a dict or a Scheme, not {scheme!r}; names: hf-autoround list schemes")
    given |= overrides
    for key in given:
        if key not in _KEYS:
            hint = suggest(key, _KEYS) or f"; there are {', '.join(_KEYS)}"
            raise UnsupportedScheme(f"a scheme has no field {key!r}{hint}")
    given = {key: value for key, value in given.items() if value is not None}
    return _override(resolved, given, base) if given else resolved


def _override(scheme: Scheme, given: Mapping[str, Any], base: Scheme | None) -> Scheme:
    bits = given.get("bits", scheme.weight.bits if scheme.weight else 16)
    if bits == 16 or ("bits" not in given and given.get("data_type") in ("fp", "float", "bf16", "fp16")):
        return BF16
    start = scheme.weight or (base.weight if base else None) or find(PRESETS, "W4A16", kind="scheme").weight
    assert start is not None
    data_type = given.get("data_type", start.data_type)
    if data_type != "int":
        raise UnsupportedScheme(f"data_type {data_type!r} is not supported; there is int (2 to 8 bits)")
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise UnsupportedScheme(f"bits={bits!r} is not supported: integers have 2 to 8 bits (16 leaves a layer as it is)")
    size, sym = given.get("group_size", start.group_size), given.get("sym", start.symmetric)
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 1):
        raise UnsupportedScheme(f"group_size={size!r} is not supported: a number of inputs, or -1 for whole rows")
    if not isinstance(sym, bool):
        raise UnsupportedScheme(f"sym={sym!r} is not supported: it is True or False")
    return integer_scheme(bits, size, sym)
