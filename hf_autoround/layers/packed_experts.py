# SPDX-License-Identifier: Apache-2.0
"""Packed experts: what a fused module's eager forward finds where its 3-D parameter used to be.

transformers' eager experts take `parameter[expert]` and multiply with it. Giving them an object that multiplies with that
one expert's packed layers keeps every architecture's own forward (gates, clamps, biases) and needs no code for any of them.

Shapes: E experts, O out features, I in features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_autoround.layers.packed_linear import PackedLinear


class PackedExpertWeight:
    """One expert's weight (O, I), or (I, O) if `transposed`, to multiply with; whatever else is done to it gets a tensor."""

    def __init__(self, layers: list[PackedLinear], transposed: bool, dtype: torch.dtype) -> None:
        self.layers, self.transposed, self.dtype = layers, transposed, dtype

    def dense(self) -> Tensor:
        """Return the weight as a tensor, in the dtype of the inputs."""
        weight = torch.cat([layer.dequantized(self.dtype) for layer in self.layers])
        return weight.t() if self.transposed else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Multiply by the layers' own kernels where torch is asked for x W^T, or x W with a transposed weight."""
        products = {F.linear: False, torch.matmul: True, Tensor.matmul: True, Tensor.__matmul__: True}
        if func in products and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            inputs, weight = args
            if weight.transposed == products[func]:
                return torch.cat([layer(inputs) for layer in weight.layers], -1)
        dense = [part.dense() if isinstance(part, cls) else part for part in args]
        return func(*dense, **{key: part.dense() if isinstance(part, cls) else part for key, part in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)


class PackedExpertWeights:
    """Stands for a parameter (E, O, I), or (E, I, O): `self[expert]` is that expert's weight.

    The packed layers are children of the experts module: `experts.<expert>.<name>`, one for each of `names`.
    """

    def __init__(self, experts: nn.Module, names: tuple[str, ...], transposed: bool, dtype: torch.dtype) -> None:
        self.experts, self.names, self.transposed, self.dtype = experts, names, transposed, dtype

    def __getitem__(self, expert: int | Tensor) -> PackedExpertWeight:
        layers = [self.experts.get_submodule(f"{int(expert)}.{name}") for name in self.names]
        return PackedExpertWeight([cast(PackedLinear, layer) for layer in layers], self.transposed, self.dtype)


def install_packed_experts(
    experts: nn.Module, parameter: str, names: tuple[str, ...], layers: dict[tuple[int, str], PackedLinear], transposed: bool
) -> None:
    """Replace a fused parameter of `experts` by packed layers, given by (expert, name)."""
    dtype = experts.get_parameter(parameter).dtype
    del experts._parameters[parameter]
    for (expert, name), layer in layers.items():
        if str(expert) not in experts._modules:
            experts.add_module(str(expert), nn.Module())
        experts.get_submodule(str(expert)).add_module(name, layer)
    weights = PackedExpertWeights(experts, names, transposed, dtype)
    experts.__dict__[parameter] = weights
    experts.config._experts_implementation = "eager"
    experts._is_hf_initialized = True

    def follow_dtype(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        weights.dtype = (args[0] if args else kwargs["hidden_states"]).dtype

    experts.register_forward_pre_hook(follow_dtype, with_kwargs=True)


def restore_fused_experts(experts: nn.Module, dtype: torch.dtype) -> None:
    """Put ordinary 3-D parameters back where packed layers stand for them."""
    for parameter, weights in list(experts.__dict__.items()):
        if isinstance(weights, PackedExpertWeights):
            weights.dtype = dtype
            count = sum(name.isdigit() for name, _ in experts.named_children())
            fused = torch.stack([weights[expert].dense() for expert in range(count)])
            del experts.__dict__[parameter]
            experts.register_parameter(parameter, nn.Parameter(fused.contiguous()))
    for name in [name for name, _ in experts.named_children() if name.isdigit()]:
        del experts._modules[name]


def holds_packed_experts(module: nn.Module) -> bool:
    """Return whether the children `<expert>.<name>` of a module are packed experts."""
    return any(isinstance(value, PackedExpertWeights) for value in module.__dict__.values())
