# SPDX-License-Identifier: Apache-2.0
"""A registry is a tuple of things with a `name`, in the order in which they are tried; this is how one is looked up."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Protocol, TypeVar

from hf_autoround.errors import UnknownName


class Named(Protocol):
    """Anything that can stand in a registry."""

    name: str


N = TypeVar("N", bound=Named)


def suggest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean a, b?" for the names near to `name` (upper and lower case alike), or nothing."""
    by_lower = {other.lower(): other for other in names}
    near = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    near += [other for other in by_lower if name.lower() in other and other not in near][: 3 - len(near)]
    return f"; did you mean {', '.join(by_lower[other] for other in near)}?" if near else ""


def find(registry: Iterable[N], name: str, *, kind: str) -> N:
    """Return the entry called `name`.

    Raises UnknownName with the near names, or with all of them if none is near.
    """
    entries = {entry.name: entry for entry in registry}
    if name in entries:
        return entries[name]
    hint = suggest(name, entries) or f"; there are {', '.join(entries)}"
    raise UnknownName(f"no {kind} is called {name!r}{hint}")
