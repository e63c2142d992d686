# SPDX-License-Identifier: Apache-2.0
"""Ranges that are larger than one row: of a whole weight, or of the layers that engines fuse into one.

Shapes: E experts, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_autoround.layers.sites import oriented
from hf_autoround.numerics import data_type
from hf_autoround.planning.fused import fused_name
from hf_autoround.planning.plan import QuantPlan


@torch.no_grad()
def shared_ranges(plan: QuantPlan, weights: Mapping[str, tuple[Tensor, bool]]) -> dict[str, Tensor]:
    """Return the largest |w| of all that shares a range with each row, ([E,] O, 1, 1), of those weights (name -> parameter,
    transposed) whose data type asks for it."""
    largest: dict[tuple, Tensor] = {}
    places: list[tuple[Tensor, tuple]] = []
    found: dict[str, Tensor] = {}
    for site in plan.sites:
        spec = plan.schemes[site.name].weight
        if site.parameter not in weights or spec is None or not data_type(spec).shares_range(spec):
            continue
        parameter = oriented(*weights[site.parameter])
        rows = found.setdefault(site.parameter, parameter.new_zeros(*parameter.shape[:-1], 1, 1, dtype=torch.float32))
        shared_by = (fused_name(site.name) if data_type(spec).shares_with_layers else site.name, spec)
        own = site.part(parameter).abs().max().float()
        largest[shared_by] = torch.maximum(largest.get(shared_by, own), own.to(largest.get(shared_by, own).device))
        places.append((site.part(rows), shared_by))
    for place, shared_by in places:
        place.fill_(largest[shared_by])
    return found
