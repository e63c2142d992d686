# SPDX-License-Identifier: Apache-2.0
"""The `auto_round` format: safetensors in GPTQ or AWQ layout, `quant_method: auto-round`.

transformers, vLLM and SGLang read that method name. `packing_format` says which layout the file uses:
`auto_round:auto_gptq` stores zero points minus one, `auto_round` plainly, `auto_round:auto_awq` in AWQ's order, `mlx` is
what `formats/mlx.py` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_autoround import __version__
from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats.base import Format, StoredPlan, StoredTensor, refuse_ragged, stored_blocks
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import AWQ, GPTQ_V1, GPTQ_V2, MLX, Layout
from hf_autoround.planning.fused import note_mixed
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, Scheme, resolve_scheme

QUANT_METHOD = "auto-round"
PACKING: dict[str, Layout] = {
    "auto_round:auto_gptq": GPTQ_V1,
    "auto_round:auto_awq": AWQ(),
    "auto_round": GPTQ_V2,
    "auto_round:gptqmodel": GPTQ_V2,
    "auto_round:gptq": GPTQ_V1,  # what transformers' own class writes
    "auto_round:awq": AWQ(),
    "mlx": MLX(),
    "auto_round:mlx": MLX(),
}


class AutoRoundFormat(Format):
    """Integers of 2 to 8 bits."""

    name = "auto_round"
    runtimes = "hf_autoround, transformers; vLLM and SGLang at 4 and 8 bits"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        assert scheme.weight is not None
        return refuse_ragged(site) or GPTQ_V1.refuse(scheme.weight, site.shape)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return None: every layer may have its own scheme."""
        return None

    def layout(self, plan: QuantPlan) -> Layout:
        """Return the layout that a plan's checkpoint is written in."""
        return _packing(plan)[1]

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        return _packing(plan)[1].empty(_weight(plan, site), site.shape)

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return name inside the layer -> tensor."""
        return _packing(plan)[1].pack(layer.tensor, _weight(plan, site), layer.columns)

    def config(self, plan: QuantPlan, names: Mapping[str, str]) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the checkpoint calls them."""
        extra = {names.get(name, name): BF16.to_dict() for name in sorted(plan.kept)}
        for name, scheme in plan.schemes.items():
            if scheme != plan.scheme or not name.startswith(f"{plan.blocks}."):
                extra[names.get(name, name)] = scheme.to_dict()
        config = {
            "quant_method": QUANT_METHOD,
            "packing_format": _packing(plan)[0],
            **plan.scheme.to_dict(),
            "block_name_to_quantize": plan.blocks,
            "provider": f"hf_autoround {__version__}",
        }
        return config | ({"extra_config": extra} if extra else {})

    def note(self, plan: QuantPlan) -> str | None:
        """Return which runtimes will not read this plan's checkpoint, or None."""
        notes = [note_mixed(plan)]
        bits = sorted({scheme.weight.bits for scheme in plan.schemes.values() if scheme.weight} - {4, 8})
        if bits:
            widths = ", ".join(str(width) for width in bits)
            others = "auto-round too" if set(bits) <= {2, 3} else "nothing else"
            notes.append(
                f"auto_round at {widths} bits: transformers with hf_autoround reads it, {others}; vLLM and SGLang do not"
            )
        return "; ".join(filter(None, notes)) or None


def read_auto_round_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what an `auto-round` configuration says.

    Raises UnsupportedScheme for numbers or layouts that we do not read.
    """
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if packing not in PACKING:
        raise UnsupportedScheme(f"packing_format {packing!r} is not supported; there are {', '.join(PACKING)}")
    if config.get("act_bits", 16) not in (None, 16):
        raise UnsupportedScheme(f"act_bits {config['act_bits']} is not supported; weights alone can be quantized")
    keys = ("bits", "group_size", "sym", "data_type")
    scheme = resolve_scheme({key: config[key] for key in keys if config.get(key) is not None})
    overrides = {
        name: resolve_scheme({key: value[key] for key in keys if value.get(key) is not None}, base=scheme)
        for name, value in (config.get("extra_config") or {}).items()
    }
    return StoredPlan(PACKING[packing], scheme, overrides, stored_blocks(config))


def packing_format(layout: Layout) -> str:
    """Return what a configuration calls a layout."""
    return next(name for name, known in PACKING.items() if known.name == layout.name)


def _weight(plan: QuantPlan, site: WeightSite):  # noqa: ANN202
    return plan.schemes[site.name].weight


def _packing(plan: QuantPlan) -> tuple[str, Layout]:
    """Choose the layout that most runtimes read: AWQ's for asymmetric 4 bits, GPTQ's otherwise."""
    weights = [scheme.weight for scheme in plan.schemes.values() if scheme.weight is not None]
    if all(weight.symmetric for weight in weights):
        return "auto_round:auto_gptq", GPTQ_V1
    if all(PACKING["auto_round:auto_awq"].refuse(_weight(plan, site), site.shape) is None for site in plan.sites):
        return "auto_round:auto_awq", PACKING["auto_round:auto_awq"]
    return "auto_round", GPTQ_V2
