# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a checkpoint once, in the order in which it lies on disk: quantized layers, and the rest as it was.

Round to nearest needs nothing but this: one tensor is in memory at a time. Tuned layers come from the journal instead
of being rounded here; what is left alone is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_autoround.errors import CheckpointError
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.models.loading import LazyModel
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.streams.journal import Journal
from hf_autoround.tuning import BlockResult, TunableWeight
from hf_autoround.tuning.rtn import nearest


@dataclass(frozen=True)
class Item:
    """One thing that a checkpoint holds: a quantized site under its module name, or a tensor under its own."""

    name: str
    content: QuantizedLayer | Tensor
    site: WeightSite | None = None


@dataclass(frozen=True)
class SourceKey:
    """A checkpoint key, and the sites whose weights it holds (several if experts are fused on disk)."""

    key: str
    sites: tuple[tuple[str, WeightSite], ...] = ()
    fused: bool = False


def source_keys(lazy: LazyModel, plan: QuantPlan) -> list[SourceKey]:
    """Return every key of the checkpoint with the sites to be quantized in it, named as the checkpoint names them.

    Raises CheckpointError if a planned site has no weight in the checkpoint.
    """
    plain = {f"{site.name}.weight": site for site in plan.sites}
    fused: dict[str, list[WeightSite]] = {}
    for site in plan.sites:
        if site.expert is not None:
            fused.setdefault(site.parameter, []).append(site)
    keys, found = [], set()
    for key, name in lazy.keys.items():
        if name in plain:
            found.add(plain[name].name)
            keys.append(SourceKey(key, ((key.removesuffix(".weight"), plain[name]),)))
        elif name in fused:
            path, _, leaf = key.rpartition(".")
            sites = tuple((f"{path}.{site.expert}.{leaf}", site) for site in fused[name])
            found.update(site.name for site in fused[name])
            keys.append(SourceKey(key, sites, fused=True))
        else:
            keys.append(SourceKey(key))
    missing = [site.name for site in plan.sites if site.name not in found]
    if missing:
        raise CheckpointError(f"{lazy.name} holds no weight for {', '.join(missing[:3])}")
    return keys


Finished = Callable[[WeightSite, Tensor], QuantizedLayer]


def stream_checkpoint(
    lazy: LazyModel, keys: list[SourceKey], finished: Finished, tuned: Callable[[str], Tensor | None] = lambda name: None
) -> Iterator[Item]:
    """Yield the whole checkpoint: `finished(site, stored weight)` gives a site's result, `tuned(name)` a tensor that
    replaces one outside of the sites, or None."""
    by_key = {source.key: source for source in keys}
    whole = [source.key for source in keys if not source.fused]
    for key, tensor in lazy.checkpoint.read(whole):
        source = by_key[key]
        if source.sites:
            name, site = source.sites[0]
            yield Item(name, finished(site, tensor), site)
        else:
            if tensor.is_floating_point():
                refuse_not_finite(key, tensor)
            other = tuned(lazy.keys[key])
            yield Item(key, tensor if other is None else other.to(tensor.dtype))
    for source in keys:
        for name, site in source.sites if source.fused else ():
            assert site.expert is not None
            yield Item(name, finished(site, lazy.checkpoint.read_slice(source.key, site.expert)), site)


def rounded(plan: QuantPlan, device: torch.device) -> Finished:
    """Round each site to nearest as it passes by."""

    def finished(site: WeightSite, stored: Tensor) -> QuantizedLayer:
        refuse_not_finite(site.name, stored)
        weight = TunableWeight(stored.to(device), site.transposed, plan.schemes[site.name])
        return nearest(weight)

    return finished


class FromJournal:
    """The results of a finished journal, one block in memory at a time."""

    def __init__(self, journal: Journal, plan: QuantPlan, unit_of: Callable[[str], str | None]) -> None:
        self.journal, self.plan, self.unit_of = journal, plan, unit_of
        self.schemes = {name: scheme for name, (scheme, _) in plan.parameters().items()}
        self.unit: str | None = None
        self.result: BlockResult | None = None

    def finished(self, site: WeightSite, stored: Tensor) -> QuantizedLayer:
        """Return a site's part of what was tuned."""
        layer = self._result(site.parameter).layers[site.parameter]
        return layer.at(site)

    def tuned(self, name: str) -> Tensor | None:
        """Return a tuned norm or bias, or None."""
        return self._result(name).tuned.get(name) if self.unit_of(name) is not None else None

    def _result(self, parameter: str) -> BlockResult:
        unit = self.unit_of(parameter)
        assert unit is not None
        if self.unit != unit or self.result is None:
            self.unit, self.result = unit, self.journal.get(unit, self.schemes)
        return self.result


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a weight holds NaN or infinity."""
    if not all(torch.isfinite(part).all() for part in tensor.flatten().split(1 << 20)):  # no mask of the whole tensor
        raise CheckpointError(f"{name} holds NaN or infinite weights; the source checkpoint is damaged")
