# SPDX-License-Identifier: Apache-2.0
"""The life cycle that transformers gives a quantizer: replace layers on the meta device, let it load, hand over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_autoround.backends import select_backend
from hf_autoround.errors import CheckpointError
from hf_autoround.formats import method_of, read_config
from hf_autoround.formats.auto_round import restate
from hf_autoround.hf.config import AutoRoundConfig
from hf_autoround.hf.group_order import layers_out_of_order
from hf_autoround.layers.packed_experts import install_packed_experts, restore_fused_experts
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layers.sites import WeightSite
from hf_autoround.layouts import IndexedGPTQ
from hf_autoround.models.blocks import find_sites, model_parts
from hf_autoround.models.checkpoint import stored_names
from hf_autoround.models.experts import fused_experts
from hf_autoround.models.loading import names_in_memory
from hf_autoround.scheme import BF16, Scheme

logger = logging.get_logger(__name__)


class AutoRoundHfQuantizer(HfQuantizer):
    """Loads `quant_method: auto-round` checkpoints into PackedLinear layers."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(AutoRoundConfig.wrap(quantization_config), **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a float checkpoint: it is quantized by the trainer, from its files."""
        if not self.pre_quantized:
            raise CheckpointError(
                "this checkpoint is not quantized yet: quantize it with AutoRound(model, scheme=...).quantize_and_save(folder) "
                "or hf-autoround --model ... --output_dir folder, and load the folder"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Load to the CPU unless told otherwise."""
        return {"": torch.device("cpu")} if device_map is None else device_map

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Say no: everything arrives packed."""
        return False

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        """Leave them alone: those that merge experts match float weights only, and some layers' experts may be float."""
        return weight_conversions

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config.to_dict()
        stored = read_config(config)
        parts = model_parts(model)
        packed_in_file = _packed_names(model, checkpoint_files)
        schemes: dict[WeightSite, Scheme] = {}
        quantizable = find_sites(model)
        for site in quantizable:
            inside = site.name.startswith(tuple(f"{path}." for path in stored.blocks or (parts.blocks,)))
            scheme = stored.scheme_of(site.name, inside)
            if scheme is None:
                continue
            if packed_in_file is not None and site.name not in packed_in_file:
                logger.warning(
                    f"{site.name} should have {scheme.name} by the checkpoint's config, but the file holds it as float: loaded so"
                )
                truth = dict(getattr(self.quantization_config, "extra_config", None) or {})
                self.quantization_config.extra_config = truth | {site.name: BF16.to_dict()}
                continue
            schemes[site] = scheme
        indexed = layers_out_of_order(model, checkpoint_files, schemes)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), r"\.g_idx$"}
        backends: dict[str, int] = {}

        def packed_layer(site: WeightSite, bias: bool, dtype: torch.dtype) -> PackedLinear:
            layout = IndexedGPTQ(stored.layout) if site.name in indexed else stored.layout
            layer = PackedLinear(site.shape, schemes[site], layout, kernel=_no_kernel, bias=bias, dtype=dtype)
            backend = select_backend(layer, site.name, torch.device("cpu"), self.quantization_config.backend)
            layer.kernel = backend.forward
            backends[backend.name] = backends.get(backend.name, 0) + 1
            return layer

        by_parameter: dict[str, list[WeightSite]] = {}
        for site in schemes:
            by_parameter.setdefault(site.parameter, []).append(site)
        for parameter, sites in by_parameter.items():
            path, _, leaf = parameter.rpartition(".")
            module = model.get_submodule(path)
            if sites[0].expert is None:
                bias = getattr(module, "bias", None) is not None
                layer = packed_layer(sites[0], bias, module.weight.dtype)
                layer.transposed = sites[0].transposed
                model.set_submodule(path, layer)
            else:
                layers = {_expert_place(site): packed_layer(site, False, module.get_parameter(leaf).dtype) for site in sites}
                names = tuple(dict.fromkeys(name for _, name in layers))
                install_packed_experts(module, leaf, names, layers, sites[0].transposed)
        _spare_initialisation(model, by_parameter)
        if method_of(config) != "auto-round":
            layers = {site.name: schemes.get(site, BF16) for site in quantizable}
            self.quantization_config = AutoRoundConfig(**restate(stored, parts.blocks, layers))
        logger.info(f"backends: {', '.join(f'{count} layers by {name}' for name, count in backends.items())}")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, PackedLinear):  # transformers makes float parameters trainable
                module.requires_grad_(False)
        model.config.quantization_config = self.quantization_config
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        kind = dtype or model.config.dtype or torch.float32
        kind = getattr(torch, kind) if isinstance(kind, str) else kind
        for _, experts in list(fused_experts(model)):
            restore_fused_experts(experts, kind)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, _plain_layer(module, kind))
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Say yes: a loaded model saves the tensors that it was loaded from."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say no: adapters come with their own glue."""
        return False


def _packed_names(model: PreTrainedModel, files: Iterable[str] | None) -> set[str] | None:
    """Return the layers that the files hold packed, by their names in memory; None if there are no files to look into."""
    if not files:
        return None
    packed = [name for name in stored_names(files) if name.endswith(".qweight")]
    return {name.removesuffix(".qweight") for name in names_in_memory(model, packed).values()}


def _spare_initialisation(model: PreTrainedModel, parameters: Iterable[str]) -> None:
    """Keep transformers from initialising what holds packed layers: some blocks reach for their layers' `weight`."""
    for parameter in parameters:
        parent = parameter.rpartition(".")[0].rpartition(".")[0]
        while parent:
            model.get_submodule(parent)._is_hf_initialized = True
            parent = parent.rpartition(".")[0]


def _plain_layer(packed: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """Return the Linear or Conv1D that a packed layer was made from, with the quantized numbers."""
    weight = packed.dequantized(dtype)
    with torch.device("meta"):
        if packed.transposed:
            plain: nn.Module = Conv1D(packed.out_features, packed.in_features)
        else:
            plain = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
    plain.weight = nn.Parameter(weight.t().contiguous() if packed.transposed else weight)
    if packed.bias is not None:
        plain.bias = nn.Parameter(packed.bias.detach().to(dtype))
    return plain


def _expert_place(site: WeightSite) -> tuple[int, str]:
    assert site.expert is not None
    return site.expert, site.name.rpartition(".")[2]


def _no_kernel(layer: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a kernel is chosen before the layer runs")
