# SPDX-License-Identifier: Apache-2.0
"""Which backend runs each packed layer: the first that does not refuse, or the one that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from hf_autoround.backends import ALIASES, BACKENDS
from hf_autoround.backends.base import Backend, missing
from hf_autoround.errors import MissingDependency, UnknownName, UnsupportedLayer
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.models.memory import release_memory
from hf_autoround.registry import suggest

logger = logging.get_logger(__name__)
_PENDING = 1 << 26  # weights repacked between two returns of freed memory: ark's left 400 MB at a billion weights


def candidates(wanted: str) -> tuple[Backend, ...]:
    """Return the backends that a name or an alias stands for; all of them for "auto".

    What is wrong with the name is known before a model is loaded: raises UnknownName, or MissingDependency if what it
    stands for is not installed.
    """
    if wanted == "auto":
        return BACKENDS
    names = ALIASES.get(wanted, (wanted,))
    found = tuple(backend for backend in BACKENDS if backend.name in names)
    if not found:
        known = ["auto", *(backend.name for backend in BACKENDS), *ALIASES]
        raise UnknownName(f"no backend is called {wanted!r}{suggest(str(wanted), known) or '; there are ' + ', '.join(known)}")
    reasons = {backend.name: missing(backend) for backend in found}
    if all(reasons.values()):
        raise MissingDependency(f"backend={wanted!r} cannot be had: {_together(reasons.items())}")
    return found


def select_backend(layer: PackedLinear, name: str, wanted: str = "auto") -> Backend:
    """Return the first backend that takes a layer where it is, or the wanted one.

    Raises UnsupportedLayer with every reason.
    """
    reasons = {}
    for backend in candidates(wanted):
        reason = missing(backend) or backend.refuse(layer, layer.device)
        if wanted == "auto" and backend.may_round_inputs and layer.compute_dtype != torch.float32:
            reason = reason or f"it may round inputs to 8 bits, which has to be asked for by name: backend={backend.name!r}"
        if reason is None:
            return backend
        reasons[backend.name] = reason
    raise UnsupportedLayer(
        f"backend={wanted!r} cannot run {name} ({layer.scheme.name}): {_together(reasons.items())}. "
        'Use backend="auto", which takes for each layer what can run it'
    )


@dataclass
class Chooser:
    """Gives packed layers the backend that was asked for, and again when they have moved to another kind of device."""

    wanted: str
    compiles: bool = True  # whether every backend given so far does

    def __call__(self, layer: PackedLinear) -> None:
        """Choose for a layer that has moved; where the wanted backend cannot run, another one does."""
        name = f"what was moved to {layer.device.type}"
        try:
            backend = select_backend(layer, name, self.wanted)
        except UnsupportedLayer as error:
            backend = select_backend(layer, name)
            logger.warning_once(f"{error}, as is done now")
        logger.info_once(f"backend {_described(backend)}: layers of {layer.scheme.name}, {name}")
        self.give(layer, backend)

    @torch.no_grad()
    def give(self, layer: PackedLinear, backend: Backend) -> None:
        """Put a layer into a backend's order, to be run by it."""
        backend.prepare(layer)
        layer.kernel, layer.chooser = backend.forward, self
        self.compiles = self.compiles and backend.compiles


def assign_backends(model: nn.Module, wanted: str = "auto") -> Chooser:
    """Give every packed layer of a loaded model its backend; return what chooses again when the model moves.

    Layer by layer, so that there is one layer more than the model in memory. Raises UnsupportedLayer, UnknownName or
    MissingDependency.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    chosen = [select_backend(layer, name, wanted) for name, layer in layers]  # before any is changed
    chooser = Chooser(wanted)
    pending = 0
    for (_, layer), backend in zip(layers, chosen, strict=True):
        chooser.give(layer, backend)
        pending += 0 if layer.repacked is None else layer.in_features * layer.out_features
        if pending > _PENDING:
            release_memory()
            pending = 0
    kinds = Counter((_described(backend), layer.scheme.name) for (_, layer), backend in zip(layers, chosen, strict=True))
    for (description, scheme), count in kinds.items():
        logger.info(f"backend {description}: {count} layers of {scheme}")
    release_memory()
    return chooser


def _described(backend: Backend) -> str:
    return f"{backend.name} (which may round inputs to 8 bits)" if backend.may_round_inputs else backend.name


def _together(reasons: Iterable[tuple[str, str | None]]) -> str:
    """Say each reason once, after the names of all that it holds for."""
    names: dict[str | None, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(those)}: {reason}" for reason, those in names.items())
