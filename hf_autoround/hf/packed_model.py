# SPDX-License-Identifier: Apache-2.0
"""Packed layers in place of float ones, in a model that is on the meta device or loaded; and float ones put back.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_autoround.layers.packed_experts import install_packed_experts, restore_fused_experts
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layers.sites import WeightSite
from hf_autoround.layouts import Layout
from hf_autoround.models.experts import fused_experts
from hf_autoround.scheme import Scheme


def by_parameter(sites: Iterable[WeightSite]) -> dict[str, list[WeightSite]]:
    """Return the sites of each parameter in memory."""
    found: dict[str, list[WeightSite]] = {}
    for site in sites:
        found.setdefault(site.parameter, []).append(site)
    return found


def install_packed_layers(
    model: PreTrainedModel,
    layers: Mapping[WeightSite, tuple[Scheme, Layout]],
    *,
    biases: Container[str] = (),
    keep_parameters: bool = False,
) -> None:
    """Replace the layers of these sites by packed ones on the meta device (biases keep their values).

    `biases` names layers that have a bias in the file, whether or not the float model has one there. With
    `keep_parameters` the float parameters stay beside the packed ones, for a loader to find: whoever quantizes them takes
    them away (`drop_parameter`).
    """

    def packed_layer(site: WeightSite, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        scheme, layout = layers[site]
        with torch.device("meta"):
            layer = PackedLinear(site.shape, scheme, layout, bias=bias is not None or site.name in biases, dtype=dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    for name, sites in by_parameter(layers).items():
        path, _, leaf = name.rpartition(".")
        module, parameter = model.get_submodule(path), model.get_parameter(name)
        if sites[0].expert is None:
            layer = packed_layer(sites[0], getattr(module, "bias", None), parameter.dtype)
            layer.transposed = sites[0].transposed
            model.set_submodule(path, layer)
            if keep_parameters:
                layer.register_parameter(leaf, parameter)
        else:
            experts = {_expert_place(site): packed_layer(site, None, parameter.dtype) for site in sites}
            names = tuple(dict.fromkeys(name for _, name in experts))
            install_packed_experts(module, leaf, names, experts, sites[0].transposed)
            if keep_parameters:
                module._parameters[leaf] = parameter
    _spare_initialisation(model, by_parameter(layers))


def drop_parameter(model: PreTrainedModel, name: str) -> None:
    """Take away a float parameter that `install_packed_layers` kept."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    del module._parameters[leaf]
    if isinstance(module, PackedLinear) and leaf in module.packed_names:  # some layouts have a tensor of that name
        size, kind = module.layout.empty(module.spec, (module.out_features, module.in_features))[leaf]
        packed = torch.empty(size, dtype=kind, device="meta")
        module.register_parameter(leaf, nn.Parameter(packed, requires_grad=False))


def restore_float_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put Linear, Conv1D and fused experts back where packed layers stand for them, with the quantized numbers."""
    for _, experts in list(fused_experts(model)):
        restore_fused_experts(experts, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, plain_layer(module, module.dequantized(), module.bias, dtype))


def _spare_initialisation(model: PreTrainedModel, parameters: Iterable[str]) -> None:
    """Keep transformers from initialising what holds packed layers: some blocks reach for their layers' `weight`."""
    for parameter in parameters:
        parent = parameter.rpartition(".")[0].rpartition(".")[0]
        while parent:
            model.get_submodule(parent)._is_hf_initialized = True
            parent = parent.rpartition(".")[0]


def plain_layer(packed: PackedLinear, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """Return the Linear or Conv1D that `packed` stands for, with this weight (O, I) and bias (O,)."""
    with torch.device("meta"):
        if packed.transposed:
            plain: nn.Module = Conv1D(packed.out_features, packed.in_features)
        else:
            plain = nn.Linear(packed.in_features, packed.out_features, bias=bias is not None)
    plain.weight = nn.Parameter((weight.t().contiguous() if packed.transposed else weight).to(dtype))
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype))
    return plain.train(packed.training)


def _expert_place(site: WeightSite) -> tuple[int, str]:
    assert site.expert is not None
    return site.expert, site.name.rpartition(".")[2]
