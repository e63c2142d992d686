# SPDX-License-Identifier: Apache-2.0
"""From what a user asks for to a plan: base scheme, `layer_config`, `ignore_layers`, head, and what formats refuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from hf_autoround.errors import UnknownName, UnsupportedLayer, UnsupportedScheme
from hf_autoround.layers.sites import WeightSite
from hf_autoround.models.quirks import KEEP_FLOAT
from hf_autoround.numerics import refuse_scheme
from hf_autoround.numerics.grouping import rows_together
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.registry import suggest
from hf_autoround.scheme import BF16, Scheme, SchemeLike, resolve_scheme

Refuse = Callable[[WeightSite, Scheme], Mapping[str, str]]  # name of a format -> its reason


def resolve_plan(
    sites: Sequence[WeightSite],
    scheme: Scheme,
    *,
    blocks: str,
    head: str | None = None,
    layer_config: Mapping[str, SchemeLike] | None = None,
    ignore_layers: Iterable[str] = (),
    keep_float: Iterable[str] = (),
    refuse: Refuse = lambda site, scheme: {},
) -> QuantPlan:
    """Return the plan for `sites` (those inside the blocks, and the head if it is to be quantized).

    `keep_float` names what else stays in 16 bits and is to be listed (routers that are no sites). `refuse(site, scheme)`
    collects the chosen formats' reasons against a site. A layer that the base scheme does not fit stays in 16 bits and is
    listed; one that `layer_config` names is an error.

    Raises UnknownName for a key that matches nothing, UnsupportedLayer or UnsupportedScheme for what cannot be stored.
    """
    config = {key: resolve_scheme(value, base=scheme) for key, value in (layer_config or {}).items()}
    for each in (scheme, *config.values()):
        if reason := refuse_scheme(each):
            raise UnsupportedScheme(f"{each.name} is not possible: {reason}")
    ignored = list(ignore_layers)
    names = [site.name for site in sites]
    matched = {key: matching(key, names) for key in [*config, *ignored]}
    for key, found in matched.items():
        if not found:
            raise UnknownName(_no_match(key, names))
    kept = dict.fromkeys(keep_float, "it decides where tokens go")
    instead = ""
    schemes: dict[str, Scheme] = {}
    for site in sites:
        chosen, named = _choose(site, scheme, config, matched, head)
        if any(site.name in matched[key] for key in ignored):
            kept[site.name] = "ignore_layers names it"
        elif chosen.weight is None:
            kept[site.name] = "its scheme is 16 bits"
        elif not named and site.name.rpartition(".")[2] in KEEP_FLOAT:
            kept[site.name] = "it decides where tokens go"
        elif reason := refuse_scheme(chosen, site.shape[1]) or _refuse_cut(site, chosen):
            if named:
                raise UnsupportedScheme(f"{site.name} cannot have {chosen.name}: {reason}")
            kept[site.name] = f"it cannot have {chosen.name}: {reason}"
        elif reasons := refuse(site, chosen):
            if named:
                raise UnsupportedScheme("; ".join(f"{name} cannot store {site.name}: {why}" for name, why in reasons.items()))
            kept[site.name] = "; ".join(f"{name} cannot store it: {why}" for name, why in reasons.items())
            instead = "; hf-autoround list formats shows what stores what"
        else:
            schemes[site.name] = chosen
    quantized = tuple(site for site in sites if site.name in schemes)
    if not quantized:
        raise UnsupportedLayer(f"no layer is left to quantize: {_summary(kept)}{instead}")
    _refuse_split_parameters(sites, schemes)
    return QuantPlan(scheme, quantized, schemes, kept, blocks)


def matching(key: str, names: Iterable[str]) -> set[str]:
    """Return the names that a key means: the very name, a part of names, or a regular expression.

    A part that ends in a digit ends there in the name too: `layers.1` is not `layers.10`.
    """
    names = list(names)
    if key in names:
        return {key}
    if re.fullmatch(r"[\w.\-]+", key):
        pattern = re.escape(key) + (r"(?!\d)" if key[-1].isdigit() else "")
    else:
        pattern = key
    try:
        return {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise UnknownName(f"{key!r} is neither a layer's name nor a regular expression ({error})") from error


def _choose(
    site: WeightSite, scheme: Scheme, config: Mapping[str, Scheme], matched: Mapping[str, set[str]], head: str | None
) -> tuple[Scheme, bool]:
    """Return the scheme that is meant for a site, and whether the user named the site. Exact names beat patterns, later
    patterns beat earlier ones."""
    if site.name in config:
        return config[site.name], config[site.name].weight is not None
    for key in reversed(config):
        if site.name in matched[key]:
            return config[key], config[key].weight is not None
    return scheme, site.name == head


def _refuse_cut(site: WeightSite, scheme: Scheme) -> str | None:
    """Return why blocks of rows would reach from one site of a fused parameter into the next, or None."""
    together = rows_together(scheme.weight.granularity) if scheme.weight else None
    if site.rows is not None and together is not None and site.shape[0] % together:
        return f"it is a part of a fused parameter and needs a multiple of {together} outputs there, not {site.shape[0]}"
    return None


def _no_match(key: str, names: list[str]) -> str:
    tails = {part for name in names for part in (name, name.rpartition(".")[2])}
    hint = suggest(key, tails) or f"; layer names look like {names[0]}"
    return f"no layer matches {key!r}{hint}"


def _summary(kept: Mapping[str, str]) -> str:
    by_reason: dict[str, int] = {}
    for reason in kept.values():
        by_reason[reason] = by_reason.get(reason, 0) + 1
    return "; ".join(f"{count} because {reason}" for reason, count in by_reason.items()) or "the model has none"


def _refuse_split_parameters(sites: Iterable[WeightSite], schemes: Mapping[str, Scheme]) -> None:
    first: dict[str, WeightSite] = {}
    for site in sites:
        other = first.setdefault(site.parameter, site)
        mine, theirs = schemes.get(site.name, BF16), schemes.get(other.name, BF16)
        if mine != theirs:
            raise UnsupportedLayer(
                f"{site.name} has scheme {mine.name} and {other.name} has {theirs.name}, but all experts of a layer are "
                f"one tensor ({site.parameter}) and share a scheme: match them with one pattern in layer_config"
            )
