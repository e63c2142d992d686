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
from hf_autoround.formats.base import (
    Format,
    StoredPlan,
    StoredTensor,
    packed_tensors,
    refuse_ragged,
    stored_blocks,
    stored_tensors,
)
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import AWQ, GPTQ_V1, GPTQ_V2, LAYOUTS, MLX, Layout
from hf_autoround.planning.fused import note_mixed
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, SCHEME_KEYS, PerBlock, Scheme, TensorSpec, resolve_scheme

QUANT_METHOD = "auto-round"
# of integers: other numbers have one layout each, whatever this says
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
    """Every data type."""

    name = "auto_round"
    runtimes = "hf_autoround, transformers; vLLM and SGLang at 4 and 8 bits"

    def refuse(self, site: WeightSite, scheme: Scheme) -> str | None:
        """Return why a site cannot be stored under a scheme, or None."""
        assert scheme.weight is not None
        ragged = refuse_ragged(site) if scheme.weight.data_type == "int" else None
        return ragged or layout_for(scheme.weight, "auto_round").refuse(scheme.weight, site.shape)

    def refuse_plan(self, plan: QuantPlan) -> str | None:
        """Return None: every layer may have its own scheme."""
        return None

    def layout(self, plan: QuantPlan, scheme: Scheme) -> Layout:
        """Return the layout of the layers of a plan that have a scheme."""
        assert scheme.weight is not None
        return layout_for(scheme.weight, _packing(plan))

    def stored(self, plan: QuantPlan, site: WeightSite, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return name inside the layer -> (shape, dtype)."""
        scheme = plan.schemes[site.name]
        return stored_tensors(self.layout(plan, scheme), scheme, site.shape)

    def store(self, plan: QuantPlan, site: WeightSite, layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return name inside the layer -> tensor."""
        return packed_tensors(self.layout(plan, layer.scheme), layer)

    def config(self, plan: QuantPlan, names: Mapping[str, str], packing: str | None = None) -> dict[str, Any]:
        """Return `quantization_config`; `names` maps layer names to what the checkpoint calls them, `packing` is the
        packing format if it is not the plan's own."""
        extra = {names.get(name, name): _numbers(BF16, plan.scheme) for name in sorted(plan.kept)}
        for name, scheme in plan.schemes.items():
            if scheme != plan.scheme or not name.startswith(f"{plan.blocks}."):
                extra[names.get(name, name)] = _numbers(scheme, plan.scheme)
        config = {
            "quant_method": QUANT_METHOD,
            "packing_format": packing or _packing(plan),
            **_numbers(plan.scheme),
            "block_name_to_quantize": plan.blocks,
            "provider": f"hf_autoround {__version__}",
        }
        return config | ({"extra_config": extra} if extra else {})

    def note(self, plan: QuantPlan) -> str | None:
        """Return which runtimes will not read this plan's checkpoint, or None."""
        notes = [note_mixed(plan)]
        schemes = [scheme for scheme in plan.schemes.values() if scheme.weight is not None]
        bits = sorted({scheme.weight.bits for scheme in schemes if scheme.weight and scheme.weight.data_type == "int"} - {4, 8})
        if bits:
            widths = ", ".join(str(width) for width in bits)
            others = "auto-round too" if set(bits) <= {2, 3} else "nothing else"
            notes.append(
                f"auto_round at {widths} bits: transformers with hf_autoround reads it, {others}; vLLM and SGLang do not"
            )
        found = {
            "quantized inputs": any(scheme.activation is not None for scheme in schemes),
            "other numbers than integers": any(scheme.weight.data_type != "int" for scheme in schemes if scheme.weight),
        }
        if what := " and ".join(name for name, is_there in found.items() if is_there):
            notes.append(
                f"auto_round with {what}: hf_autoround reads it, and most of it auto-round; for vLLM take llm_compressor where "
                "it stores the scheme"
            )
        return "; ".join(filter(None, notes)) or None


def read_auto_round_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what an `auto-round` configuration says.

    Raises UnsupportedScheme for numbers or layouts that we do not read.
    """
    packing = config.get("packing_format") or _packing_of_backend(str(config.get("backend", "auto")))
    if packing not in (*PACKING, *_FLOAT_PACKING):
        known = ", ".join(dict.fromkeys((*PACKING, *_FLOAT_PACKING)))
        raise UnsupportedScheme(f"packing_format {packing!r} is not supported; there are {known}")
    if config.get("rotation_config") or config.get("spinquant_config"):
        raise UnsupportedScheme(
            "a checkpoint with rotated weights (rotation_config) is not supported: its inputs would have to be rotated, too"
        )
    scheme = resolve_scheme({key: config[key] for key in SCHEME_KEYS if config.get(key) is not None})
    overrides = {
        name: resolve_scheme({key: value[key] for key in SCHEME_KEYS if value.get(key) is not None}, base=scheme)
        for name, value in (config.get("extra_config") or {}).items()
    }
    return StoredPlan(lambda each: layout_for(each.weight, packing), scheme, overrides, stored_blocks(config))


def layout_for(spec: TensorSpec, packing: str) -> Layout:
    """Return where numbers lie under a packing format."""
    if spec.data_type == "int":
        return PACKING.get(packing, GPTQ_V2)
    return next(layout for layout in LAYOUTS if spec.data_type in layout.data_types)


def _packing_of_backend(backend: str) -> str:
    """Return the packing format of a file that names none, but what auto-round up to 0.4 ran it with: `auto_round:exllamav2`,
    `auto_round:gptq:exllamav2`, `auto_round:awq:gemm`."""
    if "awq" in backend:
        return "auto_round:auto_awq"
    return "auto_round" if backend.startswith(("auto_round", "autoround")) and "gptq" not in backend else "auto_round:auto_gptq"


def packing_format(layout: Layout) -> str:
    """Return what a configuration calls a layout."""
    return next(name for name, known in PACKING.items() if known.name == layout.name)


def _numbers(scheme: Scheme, base: Scheme | None = None) -> dict[str, Any]:
    """Return a scheme's numbers beside those of the base scheme, as auto-round names them."""
    static_scale = scheme.activation is not None and scheme.activation.data_type == "nv_fp"
    return scheme.to_dict(base) | ({"act_data_type": "nv_fp4_with_static_gs"} if static_scale else {})


def _packing(plan: QuantPlan) -> str:
    """Choose the layout of integers that most runtimes read: AWQ's for asymmetric 4 bits, GPTQ's otherwise. Plans of other
    numbers have a name that says what auto-round calls theirs."""
    if plan.scheme.weight is not None and plan.scheme.weight.data_type != "int":
        return float_packing(plan.scheme.weight)
    weights = {site: plan.schemes[site.name].weight for site in plan.sites}
    integers = {site: weight for site, weight in weights.items() if weight is not None and weight.data_type == "int"}
    if all(weight.symmetric for weight in integers.values()):
        return "auto_round:auto_gptq"
    awq = PACKING["auto_round:auto_awq"]
    if all(awq.refuse(weight, site.shape) is None for site, weight in integers.items()):
        return "auto_round:auto_awq"
    return "auto_round"


_FLOAT_PACKING = ("auto_round:llm_compressor", "auto_round:fp8", "auto_round:fp8_static", "auto_round")


def float_packing(weight: TensorSpec) -> str:
    """Return what auto-round calls the layout of numbers that are no integers."""
    if weight.data_type == "fp":
        return "auto_round:fp8" if isinstance(weight.granularity, PerBlock) else "auto_round:fp8_static"
    return "auto_round" if weight.data_type == "mx_int" else "auto_round:llm_compressor"
