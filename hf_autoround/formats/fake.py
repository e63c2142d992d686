# SPDX-License-Identifier: Apache-2.0
"""The `fake` format: quantized weights written back as ordinary floats, for any tool that knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_autoround.formats.base import Format, StoredTensor
from hf_autoround.layers.sites import QuantizedLayer, WeightSite, oriented
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import Scheme


class FakeFormat(Format):
    """The source checkpoint's names, shapes and types; only the numbers are those of the quantized model."""

    name = "fake"
    runtimes = "everything that reads the float model (same size: for measuring, not for saving memory)"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored, or None."""
        return "its checkpoint keeps all experts in one tensor" if site.fused_on_disk else None

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return None: floats are floats."""
        return None

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        shape = (site.shape[1], site.shape[0]) if site.transposed else site.shape
        return {"weight": (shape, dtype)}

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the dequantized weight in the source's dtype."""
        return {"weight": oriented(layer.weight(), site.transposed).to(dtype).contiguous()}

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any] | None:
        """Return None: the checkpoint is a float one."""
        return None

    def note(self, plan: QuantPlan) -> str | None:
        """Return what readers of floats do not do, or None."""
        if any(scheme.activation is not None for scheme in plan.schemes.values()):
            return "fake: what reads it does not quantize inputs"
        return None
