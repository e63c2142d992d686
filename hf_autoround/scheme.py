# SPDX-License-Identifier: Apache-2.0
"""Schemes: what a layer's numbers become. Which layer gets which is a plan; how the bytes lie is a layout.

The preset names are the ones the field uses: W4A16 is 4-bit weights, 16-bit activations, groups of 128.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_autoround.errors import UnsupportedScheme
from hf_autoround.registry import find, suggest


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole weight (written `group_size=0`)."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each row of the weight, or each token of an input (written `group_size=-1`)."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` consecutive inputs of a row; a shorter last group is padded."""

    size: int


@dataclass(frozen=True)
class PerBlock:
    """One scale for every block of `rows` x `columns` (written `group_size=[rows, columns]`); the last may be smaller."""

    rows: int
    columns: int


Granularity = PerTensor | PerChannel | PerGroup | PerBlock


@dataclass(frozen=True)
class TensorSpec:
    """The numbers of one tensor: the data type's name, its bits, what shares a scale, and whether zero is in the middle."""

    data_type: str
    bits: int
    granularity: Granularity
    symmetric: bool

    @property
    def group_size(self) -> int | list[int]:
        """The group size as configuration files write it."""
        match self.granularity:
            case PerTensor():
                return 0
            case PerChannel():
                return -1
            case PerGroup(size):
                return size
            case PerBlock(rows, columns):
                return [rows, columns]


@dataclass(frozen=True)
class ActivationSpec(TensorSpec):
    """The numbers of a layer's inputs. `dynamic`: each token, or group of it, has its own range; else calibration gives one."""

    dynamic: bool = True


@dataclass(frozen=True)
class Scheme:
    """A named choice for a layer: `weight=None` leaves it in 16 bits, `activation=None` its inputs."""

    name: str
    weight: TensorSpec | None
    activation: ActivationSpec | None = None

    def to_dict(self, base: Scheme | None = None) -> dict[str, Any]:
        """Return the scheme with the key names of a checkpoint's `extra_config`.

        All of them for 16 bits too, as vLLM fills them in: it compares the entries of what it fuses key by key. If the
        checkpoint's `base` scheme quantizes inputs and this one does not, that is said.
        """
        numbers = _numbers(self.weight) if self.weight else {"bits": 16, "group_size": -1, "sym": True, "data_type": "float"}
        if self.activation is None:
            return numbers | ({"act_bits": 16} if base is not None and base.activation is not None else {})
        inputs = {f"act_{key}": value for key, value in _numbers(self.activation).items()}
        return numbers | inputs | {"act_dynamic": self.activation.dynamic}


def _numbers(spec: TensorSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric, "data_type": spec.data_type}


def integer_scheme(bits: int, group_size: int = 128, sym: bool = True) -> Scheme:
    """Return the integer scheme of these numbers, named as the presets are: W2A16G64, W4A16-asym, W8A16G-1."""
    weight = TensorSpec("int", bits, _granularity(group_size), sym)
    return Scheme(_name(weight, None), weight)


def _name(weight: TensorSpec, activation: ActivationSpec | None) -> str:
    """Return W4A16G64-asym and the like; what is not an integer is said, and so is how activations are cut."""
    inputs = "16" if activation is None else f"{activation.bits}{_cut(activation)}{'' if activation.dynamic else '-static'}"
    return f"W{weight.bits}A{inputs}{_cut(weight)}"


def _cut(spec: TensorSpec) -> str:
    size = spec.group_size
    cut = "" if size == 128 else f"G{'x'.join(map(str, size)) if isinstance(size, list) else size}"
    kind = "" if spec.data_type == "int" else f"-{spec.data_type}"
    return f"{kind}{cut}{'' if spec.symmetric else '-asym'}"


def _preset(name: str, data_type: str, bits: int, size: Any, act_type: str | None = None, act_size: Any = None) -> Scheme:
    """Return a scheme; activations have the weights' bits, and are static per tensor."""
    activation = None
    if act_type is not None:
        cut = _granularity(size if act_size is None else act_size)
        activation = ActivationSpec(act_type, bits, cut, True, dynamic=not isinstance(cut, PerTensor))
    return Scheme(name, TensorSpec(data_type, bits, _granularity(size), True), activation)


def _granularity(size: Any) -> Granularity:
    """Return what a group size means; raises UnsupportedScheme."""
    if isinstance(size, list | tuple) and len(size) == 2 and all(_whole(part) and part > 0 for part in size):
        return PerBlock(*size)
    if not _whole(size) or size < -1:
        raise UnsupportedScheme(
            f"group_size={size!r} is not supported: a number of inputs, -1 for whole rows, 0 for the whole tensor, or two "
            "numbers for blocks"
        )
    return {-1: PerChannel(), 0: PerTensor()}.get(size) or PerGroup(size)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


BF16 = Scheme("BF16", None)

# To add one: a line here. Names are upper case; a user may write them in any case.
PRESETS: tuple[Scheme, ...] = (
    *(integer_scheme(bits) for bits in range(2, 9)),
    *(integer_scheme(bits, size) for size in (64, 32) for bits in range(2, 9)),
    _preset("INT8", "int", 8, -1, "int"),
    _preset("MXFP4", "mx_fp", 4, 32, "mx_fp"),
    _preset("MXFP8", "mx_fp", 8, 32, "mx_fp"),
    _preset("MXFP4_RCEIL", "mx_fp", 4, 32, "mx_fp_rceil"),
    _preset("MXFP8_RCEIL", "mx_fp", 8, 32, "mx_fp_rceil"),
    _preset("MXINT4", "mx_int", 4, 32, "mx_int"),
    _preset("NVFP4", "nv_fp", 4, 16, "nv_fp"),
    _preset("FPW8A16", "fp", 8, 0),
    _preset("FP8_STATIC", "fp", 8, -1, "fp", 0),
    _preset("FP8_BLOCK", "fp", 8, (128, 128), "fp", 128),
    BF16,
)

SCHEME_KEYS = ("bits", "group_size", "sym", "data_type", "act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")
SchemeLike = Scheme | str | Mapping[str, Any]


def resolve_scheme(scheme: SchemeLike, base: Scheme | None = None, **overrides: Any) -> Scheme:
    """Return the scheme that a user means.

    `scheme` is a preset name, a Scheme, or a dict with any of bits, group_size, sym, data_type, the same with `act_` before
    them for activations, act_dynamic, and `scheme` (a preset to start from); what a dict leaves out comes from `base`.
    `overrides` are the same keys, those that are None left alone. 16 bits mean "leave it in 16 bits". What activations
    leave out is as the weights have it.

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
        if key not in SCHEME_KEYS:
            hint = suggest(key, SCHEME_KEYS) or f"; there are {', '.join(SCHEME_KEYS)}"
            raise UnsupportedScheme(f"a scheme has no field {key!r}{hint}")
    given = {key: value for key, value in given.items() if value is not None}
    return _override(resolved, given, base) if given else resolved


def _override(scheme: Scheme, given: Mapping[str, Any], base: Scheme | None) -> Scheme:
    weight = _weight({key: value for key, value in given.items() if not key.startswith("act_")}, scheme, base)
    if weight is None:
        return BF16
    inputs = {key.removeprefix("act_"): value for key, value in given.items() if key.startswith("act_")}
    activation = _activation(inputs, weight, scheme.activation)
    known = next((preset for preset in PRESETS if (preset.weight, preset.activation) == (weight, activation)), None)
    return known or Scheme(_name(weight, activation), weight, activation)


def _weight(given: dict[str, Any], scheme: Scheme, base: Scheme | None) -> TensorSpec | None:
    data_type, implied = _data_type(given.pop("data_type", None))
    start = scheme.weight
    if data_type is not None and (start is None or data_type != start.data_type):  # then its groups are of another kind, too
        start = next((preset.weight for preset in PRESETS if preset.weight and preset.weight.data_type == data_type), start)
    bits = given.pop("bits", implied or (start.bits if start else 16))
    if bits == 16 or data_type in _SIXTEEN_BITS:
        return None
    start = start or (base.weight if base else None) or find(PRESETS, "W4A16", kind="scheme").weight
    assert start is not None
    return _spec(given, data_type or start.data_type, bits, start)


def _activation(given: dict[str, Any], weight: TensorSpec, start: ActivationSpec | None) -> ActivationSpec | None:
    data_type, implied = _data_type(given.pop("data_type", None))
    bits = given.pop("bits", implied or (start.bits if start else 16))
    if bits == 16 or data_type in _SIXTEEN_BITS:
        return None
    dynamic = given.pop("dynamic", start.dynamic if start else True)
    if not isinstance(dynamic, bool):
        raise UnsupportedScheme(f"act_dynamic={dynamic!r} is not supported: it is True or False")
    if start is None:
        cut = weight.granularity
        row = PerGroup(cut.columns) if isinstance(cut, PerBlock) else PerChannel() if isinstance(cut, PerTensor) else cut
        start = ActivationSpec(weight.data_type, bits, row if dynamic else PerTensor(), weight.symmetric)
    spec = _spec(given, data_type or start.data_type, bits, start, "act_")
    return ActivationSpec(spec.data_type, spec.bits, spec.granularity, spec.symmetric, dynamic)


def _spec(given: Mapping[str, Any], data_type: str, bits: Any, start: TensorSpec, prefix: str = "") -> TensorSpec:
    if not _whole(bits) or not 2 <= bits <= 8:
        raise UnsupportedScheme(
            f"{prefix}bits={bits!r} is not supported: numbers have 2 to 8 bits (16 leaves {'inputs' if prefix else 'a layer'} as "
            f"{'they are' if prefix else 'it is'})"
        )
    sym = given.get("sym", start.symmetric)
    if not isinstance(sym, bool):
        raise UnsupportedScheme(f"{prefix}sym={sym!r} is not supported: it is True or False")
    return TensorSpec(data_type, bits, _granularity(given.get("group_size", start.group_size)), sym)


_SIXTEEN_BITS = ("float", "bf16", "fp16")


def _data_type(name: str | None) -> tuple[str | None, int | None]:
    """Return a data type and the bits that its name implies: `mx_fp4` is `mx_fp` of 4 bits.

    `nv_fp4_with_static_gs` is what auto-round calls activations of `nv_fp`.
    """
    if name is None:
        return None, None
    plain = str(name).lower().removesuffix("_with_static_gs")
    found = re.fullmatch(r"([a-z_]+)(\d)(\w*)", plain)
    return (found[1] + found[3], int(found[2])) if found else (plain, None)
