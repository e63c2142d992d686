# SPDX-License-Identifier: Apache-2.0
"""The one place that touches transformers' semi-private loading functions, verified from 5.16 to 5.24.

A model is built on the meta device: names, shapes, no weights. Its parts are then loaded through transformers' own
converters (renamed keys, experts merged into 3-D parameters), one block at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from hf_autoround.errors import CheckpointError, UnsupportedLayer
from hf_autoround.models.checkpoint import Checkpoint, CheckpointFolder, CheckpointInMemory
from hf_autoround.models.float8_source import Float8Checkpoint, refuse_source
from hf_autoround.models.quirks import quirk


@dataclass(frozen=True)
class LazyModel:
    """A model without weights and the checkpoint that they come from.

    `keys` maps each checkpoint key to the name that it has in memory before experts are merged.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    keys: dict[str, str]
    name: str

    def keys_under(self, prefix: str) -> list[str]:
        """Return the checkpoint keys of the module at `prefix`."""
        return [key for key, name in self.keys.items() if name.startswith(f"{prefix}.")]


def open_model(model: str | Path | PreTrainedModel, *, trust_remote_code: bool = False) -> LazyModel:
    """Open a float model: a folder, a Hub id, or a model in memory (which is read, never changed).

    Raises CheckpointError or UnsupportedLayer before any weight is read.
    """
    if isinstance(model, PreTrainedModel):
        own = {id(tensor): key for key, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
        first = set(own.values())  # tied weights once, under their first name, as save_pretrained does
        state = {key: value.detach() for key, value in model.state_dict().items() if key in first}
        tensors = revert_weight_conversion(model, state)
        if any(tensor.device.type == "meta" for tensor in tensors.values()):
            raise CheckpointError("the model is partly offloaded; pass the folder or id that it was loaded from instead")
        config, name = model.config, model.name_or_path or type(model).__name__
        checkpoint: Checkpoint = CheckpointInMemory(tensors)
        model_class: type | None = type(model)
    else:
        folder, name = _find_folder(model), str(model)
        config = _read_config(folder, trust_remote_code)
        checkpoint, model_class = CheckpointFolder(folder), None
    checkpoint, config = _as_floats(checkpoint, config, name)
    refuse_model_type(config, name)
    skeleton = build_skeleton(config, model_class, trust_remote_code)
    return LazyModel(skeleton, checkpoint, names_in_memory(skeleton, checkpoint.entries), name)


def build_skeleton(config: PretrainedConfig, model_class: type | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model of a config on the meta device; buffers that no checkpoint holds (rotary tables) are real.

    Experts run one at a time ("eager"): every product can be watched, and the order of sums is fixed.
    """
    config = deepcopy(config)
    config._experts_implementation = "eager"
    with init_empty_weights(include_buffers=False):
        if model_class is not None:
            model = model_class(config)
        else:
            remote = getattr(config, "auto_map", None) or {}
            if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in remote:
                raise UnsupportedLayer(
                    f"transformers has no causal language model of type {config.model_type}, and only those are quantized"
                )
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False)
    model.tie_weights()
    return model


def load_keys(lazy: LazyModel, keys: Iterable[str], device: torch.device, dtype: torch.dtype) -> None:
    """Load these checkpoint keys into the model, through transformers' converters.

    Raises CheckpointError if a tensor has the wrong shape or cannot be converted.
    """
    state_dict = dict(lazy.checkpoint.read(keys))
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        weight_mapping=conversions(lazy.model),
    )
    _take_dtype(lazy.model, dtype)
    with hidden_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(
            model=lazy.model, state_dict=state_dict, load_config=config, disk_offload_index=None
        )
    if info.mismatched_keys or info.conversion_errors:
        problems = [str(problem) for problem in [*info.mismatched_keys, *info.conversion_errors.values()]]
        raise CheckpointError(f"{lazy.name} does not fit its own config.json: {'; '.join(problems[:3])}")
    lazy.model.tie_weights()
    lazy.model.requires_grad_(False)


def evict(module: nn.Module) -> None:
    """Drop a module's parameters: they go back to the meta device."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type != "meta":
            set_module_tensor_to_device(module, name, "meta")


def conversions(model: PreTrainedModel) -> list[WeightRenaming | WeightConverter]:
    """Return how checkpoint keys become this model's parameters."""
    return list(get_model_conversion_mapping(model))


def names_in_memory(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Map checkpoint keys to names in memory: renamed, the base model's prefix added or dropped, experts not merged."""
    mapping = conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, tensors = model.base_model_prefix, model.state_dict()
    names = {}
    for key in keys:
        merged, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        plain, _ = rename_source_key(key, renamings, [], prefix, tensors)
        if pattern is not None:  # an expert's name is in no state dict: give it the prefix that its merged name got
            if merged.startswith(f"{prefix}.") and not plain.startswith(f"{prefix}."):
                plain = f"{prefix}.{plain}"
        names[key] = plain
    if any(key == f"{prefix}.{name}" for key, name in names.items()):  # the base model alone: the same for experts, packed ones
        names = {key: name.removeprefix(f"{prefix}.") for key, name in names.items()}
    return names


class LeaveAlone(WeightConverter):
    """Stands before a model's own converters and keeps them from tensors that they would merge: those of packed experts,
    where a layout calls its codes `weight` (transformers 5.16 takes all whose names begin so). Behind them it makes
    transformers write what is offloaded anew, as after every converter.

    `names` are the layers' names in memory. It never counts as used, so that saving knows nothing of it.
    """

    def __init__(self, names: frozenset[str], base_model_prefix: str) -> None:
        super().__init__("left alone", "left alone", [_AsItIs()])
        self.names, self.prefix = names, f"{base_model_prefix}."

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the key as it is, and whether it is one of these."""
        known = _own_name(source_key.rpartition(".")[0], self.prefix, self.names)
        return source_key, self.source_patterns[0] if known else None

    def __deepcopy__(self, memo: dict) -> LeaveAlone:
        return LeaveAlone(self.names, self.prefix.removesuffix("."))  # one for each tensor: the names need no copies


class Unstack(WeightConverter):
    """Takes tensors that hold a layer for each expert apart; never counts as used either.

    `stacks` maps a stack's name in memory to the names of its layers.
    """

    def __init__(self, stacks: Mapping[str, Sequence[str]], base_model_prefix: str) -> None:
        super().__init__("stacked", "stacked", [_Unstack(stacks)])
        self.stacks, self.prefix = stacks, f"{base_model_prefix}."

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the name of the first layer's tensor, if the key is that of a stack."""
        key, _, leaf = source_key.rpartition(".")
        stack = _own_name(key, self.prefix, self.stacks)
        return (f"{self.stacks[stack][0]}.{leaf}", self.source_patterns[0]) if stack else (source_key, None)

    def __deepcopy__(self, memo: dict) -> Unstack:
        return Unstack(self.stacks, self.prefix.removesuffix("."))


def _own_name(name: str, prefix: str, names: Container[str]) -> str | None:
    """Return which of these names, in memory, a layer of a file has: the base model's have no prefix in one of the two."""
    return next((own for own in (name, name.removeprefix(prefix), prefix + name) if own in names), None)


class _AsItIs(ConversionOps):
    def convert(self, input_dict: dict, *args: Any, full_layer_name: str = "", **kwargs: Any) -> dict:
        (tensor,) = input_dict.values()
        return {full_layer_name: tensor}


class _Unstack(ConversionOps):
    def __init__(self, stacks: Mapping[str, Sequence[str]]) -> None:
        self.layers = {layers[0]: layers for layers in stacks.values()}

    def convert(self, input_dict: dict, *args: Any, full_layer_name: str = "", **kwargs: Any) -> dict:
        ((tensor,),) = input_dict.values()
        first, _, leaf = full_layer_name.rpartition(".")
        # copies: layers that share memory could not be saved
        return {f"{layer}.{leaf}": part.clone() for layer, part in zip(self.layers[first], tensor, strict=True)}


@contextmanager
def hidden_progress_bar() -> Iterator[None]:
    """Hide transformers' "Loading weights" bar: there would be one for every block."""
    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()


def _find_folder(model: str | Path) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise CheckpointError(f"there is no folder {model}; give a model folder or a Hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model} is neither a folder nor a model that the Hub gives us ({reason})") from error


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: it is not a transformers checkpoint")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {reason}") from error


def _as_floats(checkpoint: Checkpoint, config: PretrainedConfig, name: str) -> tuple[Checkpoint, PretrainedConfig]:
    """Return a checkpoint and its configuration without the float8 that it may be stored in.

    Raises CheckpointError for a checkpoint that is quantized otherwise.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return checkpoint, config
    method = stored if isinstance(stored, dict) else stored.to_dict()
    reason = refuse_source({**method, "quant_method": getattr(method.get("quant_method"), "value", method.get("quant_method"))})
    if reason:
        raise CheckpointError(f"{name} is {reason}")
    plain = deepcopy(config)
    del plain.quantization_config
    return Float8Checkpoint(checkpoint, method, config.dtype or torch.bfloat16), plain


def refuse_model_type(config: PretrainedConfig, name: str) -> None:
    """Raise UnsupportedLayer for a kind of model that cannot be quantized; `name` is what to call it."""
    reason = quirk(config.model_type).refuse
    if reason:
        raise UnsupportedLayer(f"{name} is a {config.model_type} model, which cannot be quantized: {reason}")


def _take_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give parameters that are not loaded yet `dtype`: the loader casts to the type of what it replaces."""
    for parameter in model.parameters():
        if parameter.device.type == "meta" and parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
