# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed layers: what PEFT's own LoRA layer and model must do differently when a weight is a packed integer.

PEFT has no plug-in mechanism, but it looks up the class that puts adapters into a model in a table: ours takes LoRA's
place there as soon as both packages are imported. It is PEFT's own class in everything but packed layers. So
`get_peft_model`, `PeftModel.from_pretrained` and `model.add_adapter` need nothing from the user.

Merging an adapter makes a plain layer of a packed one, exactly; `merge_onto_grid` rounds it back instead.

Shapes: O out features, I in features, G groups, S group size.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_autoround.errors import AutoRoundError, UnsupportedLayer, require
from hf_autoround.hf.packed_model import plain_layer
from hf_autoround.layers.packed_experts import holds_packed_experts
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.numerics.feedback import round_with_feedback
from hf_autoround.tuning.opt_rtn import searched
from hf_autoround.tuning.rtn import by_rows
from hf_autoround.tuning.task import TunableWeight

if TYPE_CHECKING:
    from hf_autoround.hf.quantizer import AutoRoundHfQuantizer

logger = logging.get_logger(__name__)

_INITIALISATIONS = (True, False, "gaussian")  # the others decompose the float weight, and change it


def register() -> None:
    """Put our LoRA model in place of PEFT's. Doing it twice changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.lora import Linear
    from peft.utils import PeftType

    known = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    if not issubclass(known, LoraOnPackedModel):
        layer = type("AutoRoundLoraLinear", (LoraOnPacked, Linear), {"__module__": __name__})
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = type(
            "LoraModel", (LoraOnPackedModel, known), {"__module__": __name__, "packed_layer": layer}
        )


def prepare_model_for_lora(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> PreTrainedModel:
    """Make a quantized model ready for adapters, as `prepare_model_for_kbit_training` does for other quantizations.

    Everything is frozen; norms, embeddings and whatever else is not packed is cast to `dtype` (None leaves it) until an
    adapter is merged and unloaded, and packed layers multiply as before; activations are recomputed in the backward pass,
    and the embedding's outputs ask for gradients.
    Raises AutoRoundError for a model without packed layers, or a part of one.
    """
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        raise AutoRoundError(
            "prepare_model_for_lora is for models that hf_autoround quantized, and this one has no packed layer; "
            "get_peft_model takes a float model as it is"
        )
    quantizer = _quantizer(model)
    if quantizer is None:
        raise AutoRoundError(
            f"prepare_model_for_lora needs the whole model, as from_pretrained returned it, and this {type(model).__name__} is a "
            "part of one; pass the model that it is a part of"
        )
    model.requires_grad_(False)
    if dtype is not None:
        quantizer.cast_for_training(model, dtype)
    if use_gradient_checkpointing:
        model.enable_input_require_grads()
        # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs)
    return model


def merge_onto_grid(model: Any, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Merge a PeftModel's adapters, rounding each packed weight to its own scheme again; return the base model.

    Scales are searched anew, and weights rounded so that what the adapters read keeps its output. The result has the size,
    speed and config of the quantized model, but a coarse grid cannot hold every change: how much it holds is logged.
    `model.merge_and_unload()` merges exactly, into plain layers. Layers that are not packed are merged as PEFT does.
    Raises AutoRoundError if there is nothing to merge.
    """
    peft = require("peft", for_="merge_onto_grid")
    if not isinstance(model, peft.PeftModel):
        raise AutoRoundError(
            f"merge_onto_grid merges a PeftModel, not a {type(model).__name__}: get one from get_peft_model, or from "
            "PeftModel.from_pretrained(model, folder)"
        )
    layers = [module for module in model.modules() if isinstance(module, LoraOnPacked)]
    if not layers:
        raise AutoRoundError("merge_onto_grid found no adapter on a packed layer; merge_and_unload merges all others")
    survived: list[float] = []
    for layer in layers:
        layer.survived = survived
    try:
        merged = model.merge_and_unload(safe_merge=True, adapter_names=None if adapter_names is None else list(adapter_names))
    finally:
        for layer in layers:
            layer.survived = None
    mean = sum(survived) / max(1, len(survived))
    log = logger.info if mean > 0.5 else logger.warning
    log(f"{len(survived)} layers merged onto their grids, which hold {mean:.0%} of what the adapters change in the weights")
    return merged


class LoraOnPacked(nn.Module):
    """What `peft.tuners.lora.Linear`, the class after it in the order of inheritance, does otherwise on a packed layer.

    While adapters are merged, `base_layer` is a plain layer with the sum of all weights and the packed one waits in
    `packed_aside` (a tuple: it must not appear in the state dict). Unmerging puts it back, so nothing is rounded twice.
    """

    base_layer: nn.Module
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # a packed weight is (O, I), also where it stands for a Conv1D
        self.packed_aside: tuple[PackedLinear, ...] = ()
        self.survived: list[float] | None = None  # set while merging onto the grid, whose outcome it collects

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """Refuse what needs the float weight: every variant of LoRA, and initialisations that decompose it."""
        names = [part.name for part in dataclasses.fields(config) if part.metadata.get("is_lora_variant")]
        asked = [name for name in names if getattr(config, name)]
        if config.init_lora_weights not in _INITIALISATIONS:
            asked.append(f"init_lora_weights={config.init_lora_weights!r}")
        if asked:
            raise UnsupportedLayer(
                f"a packed layer cannot have {', '.join(asked)}: it has no float weight. It takes plain LoRA, with use_rslora, "
                "lora_bias, dropout and init_lora_weights=True, False or 'gaussian'"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's layer does, in the dtype of `x`; a merged weight has its own."""
        if not self.packed_aside or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        return super().forward(x.to(self.base_layer.weight.dtype), *args, **kwargs).to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a plain layer with the adapters added in place of the packed one."""
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        packed = self.packed()
        weight, bias = self._sum(packed, [*self.merged_adapters, *names])
        if safe_merge and not all(part is None or part.isfinite().all() for part in (weight, bias)):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        plain = plain_layer(packed, weight, bias, packed.compute_dtype).requires_grad_(False)
        self.packed_aside, self.base_layer = (packed,), plain
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the packed layer back, as it was."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer, self.packed_aside = self.packed().to(self.base_layer.weight.device), ()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Return the layer that takes this one's place when PEFT leaves the model."""
        if merge:
            self.merge(safe_merge, adapter_names)
        if self.survived is None or not self.merged_adapters:
            return self.base_layer
        packed = self.packed().to(self.base_layer.weight.device)
        weight, bias = self._sum(packed, self.merged_adapters)
        directions = torch.cat([self.lora_A[name].weight.to(weight.device).float() for name in self.merged_adapters])
        self.survived.append(_round_onto_grid(packed, weight, bias, directions))
        return packed

    def packed(self) -> PackedLinear:
        """Return the packed layer, merged or not."""
        layer = self.packed_aside[0] if self.packed_aside else self.base_layer
        assert isinstance(layer, PackedLinear)
        return layer

    @torch.no_grad()
    def _sum(self, packed: PackedLinear, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return weight (O, I) and bias (O,) with the adapters `names` added, float32."""
        weight = packed.dequantized()
        bias = None if packed.bias is None else packed.bias.float()
        for name in names:
            weight = weight + self.get_delta_weight(name).to(weight.device, torch.float32)
            if self.lora_bias[name]:
                if bias is None:
                    raise UnsupportedLayer(
                        f"adapter {name} has lora_bias=True and cannot be merged: the layer below has no bias to take it"
                    )
                bias = bias + self.lora_B[name].bias.float() * self.scaling[name]
        return weight, bias

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Spare PEFT the guess, and the user its warning."""
        assert isinstance(module, PackedLinear)
        return module.in_features, module.out_features


class LoraOnPackedModel(nn.Module):
    """What PEFT's `LoraModel`, the class after it in the order of inheritance, does otherwise on a quantized model."""

    packed_layer: type

    @classmethod
    def _create_new_module(cls, lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, PackedLinear):
            return cls.packed_layer(target, adapter_name, lora_config, **kwargs)
        return super()._create_new_module(lora_config, adapter_name, target, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter in. "all-linear" is resolved here: PEFT knows linear layers by their class."""
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = _all_linear(config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        found = super()._check_target_module_exists(peft_config, key)
        if found and _packed_expert(self.model, key):
            # on the float model their names match nothing either: all experts are one parameter there
            leaf = key.rpartition(".")[2]
            logger.warning_once(f"LoRA does not reach packed experts: every {leaf} inside experts stays without an adapter")
            return False
        return found

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        quantizer = _quantizer(model)
        if quantizer is not None:
            quantizer.name_plain_layers(model)
            quantizer.undo_cast(model)
        return model


def _quantizer(model: nn.Module) -> AutoRoundHfQuantizer | None:
    """Return what loaded a model, if that was ours."""
    from hf_autoround.hf.quantizer import AutoRoundHfQuantizer  # slow to import, and `import peft` runs this file

    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer if isinstance(quantizer, AutoRoundHfQuantizer) else None


def _all_linear(peft_config: Any, model: nn.Module) -> set[str]:
    """Return the names of all linear layers but the head, packed ones included."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    plain = _maybe_include_all_linear_layers(peft_config, model).target_modules
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    packed = (name for name, module in model.named_modules() if isinstance(module, PackedLinear) and module is not head)
    return set(plain) | {name for name in packed if not _packed_expert(model, name)}


def _packed_expert(model: nn.Module, name: str) -> bool:
    """Return whether `name` is `experts.<expert>.<name>` of a module that holds packed experts."""
    experts = name.rsplit(".", 2)[0]
    return experts != name and holds_packed_experts(model.get_submodule(experts))


@torch.no_grad()
def _round_onto_grid(packed: PackedLinear, weight: Tensor, bias: Tensor | None, directions: Tensor) -> float:
    """Give a packed layer another weight (O, I) and bias; return how much of the change its numbers made, 1 for all of it.

    Scales are searched. Rounding to nearest would then undo every change that is small beside the grid's steps, so
    integers are rounded such that the inputs that the adapters read, `directions` (R, I), keep their outputs. (A model
    of 7 million weights at 4 bits, perplexity on the text that an adapter learned: 421 without it, 66.3 with it, 85.3
    merged to nearest, 66.6 merged so.)
    """
    if bias is not None:
        packed.bias.copy_(bias)
    before = packed.dequantized()
    change = weight - before
    if not change.any():
        return 1.0
    rounded = by_rows(TunableWeight(weight, False, packed.scheme), lambda rows: searched(rows, None)).tensor
    if packed.spec.data_type == "int":
        rounded = round_with_feedback(weight, rounded, packed.spec, directions)
    packed.load_quantized(rounded)
    return ((packed.dequantized() - before) * change).sum().item() / change.square().sum().item()
