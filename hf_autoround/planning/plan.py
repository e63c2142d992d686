# SPDX-License-Identifier: Apache-2.0
"""The plan: which site gets which scheme, decided before any weight is read and never changed after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_autoround.layers.sites import WeightSite
from hf_autoround.scheme import Scheme


@dataclass(frozen=True)
class QuantPlan:
    """`sites` are the weights to quantize, `schemes` theirs by name; `kept` says why others stay in 16 bits.

    `blocks` is the path of the list of blocks, as configuration files name it.
    """

    scheme: Scheme
    sites: tuple[WeightSite, ...]
    schemes: Mapping[str, Scheme]
    kept: Mapping[str, str]
    blocks: str

    def parameters(self) -> dict[str, tuple[Scheme, WeightSite]]:
        """Return the scheme of each parameter in memory, with one of its sites."""
        return {site.parameter: (self.schemes[site.name], site) for site in self.sites}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON: what a resumed run is compared with."""
        return {"kept": sorted(self.kept), "schemes": {name: scheme.to_dict() for name, scheme in sorted(self.schemes.items())}}
