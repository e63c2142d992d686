# SPDX-License-Identifier: Apache-2.0
"""The life cycle that transformers gives a quantizer: replace layers on the meta device, let it load, hand over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_autoround.backends.select import Chooser, assign_backends, candidates
from hf_autoround.calibration.batches import CalibrationSet
from hf_autoround.errors import AutoRoundError, UnsupportedLayer, UnsupportedScheme
from hf_autoround.formats import read_config
from hf_autoround.formats.mlx import QUANTIZATION
from hf_autoround.hf.config import AutoRoundConfig
from hf_autoround.hf.on_load import FORMAT, RoundWhileLoading, calibrate_loaded, data_on_load, plan_on_load
from hf_autoround.hf.packed_model import install_packed_layers, restore_float_layers
from hf_autoround.hf.stored_model import disk_names, read_stored_model
from hf_autoround.layers.packed_experts import holds_packed_experts
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layouts import Layout
from hf_autoround.models.blocks import find_sites
from hf_autoround.models.checkpoint import stored_names
from hf_autoround.models.float8_source import refuse_source
from hf_autoround.models.loading import LeaveAlone, Unstack, names_in_memory
from hf_autoround.numerics import needs_calibration
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import BF16, Scheme, resolve_scheme
from hf_autoround.trainer.arguments import RoundingArguments
from hf_autoround.trainer.run import wanted_scheme

logger = logging.get_logger(__name__)


class AutoRoundHfQuantizer(HfQuantizer):
    """Loads quantized checkpoints into PackedLinear layers, and quantizes float ones on the way."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(AutoRoundConfig.wrap(quantization_config), **kwargs)
        stored = self.quantization_config.stored or {}
        if self.pre_quantized and "packing_format" not in stored and self.quantization_config.backend == stored.get("backend"):
            self.quantization_config.backend = "auto"  # the file's only says how it is packed
        self.plan: QuantPlan | None = None  # of a float checkpoint
        self.data: CalibrationSet | None = None  # that it is to be calibrated on
        self.arguments: RoundingArguments | None = None
        self.rounding: RoundWhileLoading | None = None  # what rounds each of its parameters, unless it is calibrated
        self.names: dict[str, str] = {}  # of its layers, in memory -> in its files
        self.apart: list[LeaveAlone | Unstack] = []  # what keeps packed experts from being merged
        self.renewed: list[LeaveAlone] = []  # what has offloaded layers written anew whose codes are called `weight`
        self.relayouts: dict[Scheme, Layout] = {}  # for layers whose file has one that kernels do not read
        self.packed_layers: tuple[str, ...] = ()  # by name, when the model was loaded
        self.cast: dict[str, torch.dtype] = {}  # parameters and buffers that train in another dtype, and their own
        self.chooser: Chooser | None = None  # of backends, in a loaded model whose layers a compiler takes whole

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a backend that cannot be had, arguments that cannot be meant, a placement that cannot be calibrated."""
        candidates(self.quantization_config.backend)
        if self.pre_quantized:
            return
        self.arguments = self.quantization_config.arguments("unused")
        spread = isinstance(device_map, Mapping) and len({str(device) for device in device_map.values()}) > 1
        if self._needs_data and spread:
            raise UnsupportedLayer(
                "a model that is spread over devices or offloaded cannot be calibrated while it loads; quantize it from its "
                "files, which needs one block in memory: hf-autoround --model ... or RoundingTrainer(...).train()"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Load to the CPU unless told otherwise."""
        return {"": torch.device("cpu")} if device_map is None else device_map

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Say whether a float parameter is to be rounded as it streams in."""
        return self.rounding is not None and param_name in self.rounding.sites

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes of an element once it is loaded: none of a parameter whose packed tensors are counted."""
        return 0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> RoundWhileLoading:
        """Return what transformers' loader calls with each parameter that is to be rounded."""
        assert self.rounding is not None
        return self.rounding

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        """Keep those that merge experts from the packed ones; some layers' experts may be float."""
        return [*self.apart, *weight_conversions, *self.renewed]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._prepare_packed(model, checkpoint_files)
            return
        assert self.arguments is not None
        keys = {name: key for key, name in names_in_memory(model, stored_names(checkpoint_files or ())).items()}
        self.names = disk_names(find_sites(model), keys)
        self.plan = plan_on_load(model, self.arguments)
        if self._needs_data:
            with torch.device("cpu"):
                self.data = data_on_load(model, self.quantization_config, self.arguments)
        else:
            if self.arguments.device_map is not None:
                raise AutoRoundError(
                    f"AutoRoundConfig(device_map={self.arguments.device_map!r}): that is where blocks are tuned, and these "
                    "weights are rounded to nearest as they are loaded; give device_map to from_pretrained"
                )
            if note := FORMAT.note(self.plan):
                logger.warning(note)
            self.rounding = RoundWhileLoading(self.plan)
            schemes = self.plan.schemes
            layers = {site: (schemes[site.name], FORMAT.layout(self.plan, schemes[site.name])) for site in self.plan.sites}
            install_packed_layers(model, layers, keep_parameters=True)
            # else transformers takes the float tensor of the same name, in the original file, for what is offloaded
            namesakes = frozenset(site.name for site in layers if "weight" in model.get_submodule(site.name).packed_names)
            self.renewed = [LeaveAlone(namesakes, model.base_model_prefix)]

    def _prepare_packed(self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None) -> None:
        """Make the packed layers that a quantized checkpoint's tensors go into."""
        config = self.quantization_config
        said = config.stored or config.to_dict()
        plan = read_config(said)
        if config.scheme is not None and refuse_source(said) is None and resolve_scheme(config.scheme) != plan.scheme:
            raise UnsupportedScheme(
                f"this {said['quant_method']} checkpoint holds {plan.scheme.name}, and {config.scheme} is asked for: it is a "
                "source: quantize it from its files, with AutoRound(...) or hf-autoround"
            )
        with torch.device("cpu"):  # transformers calls this with meta as the default device
            stored = read_stored_model(model, plan, checkpoint_files)
        if stored.config is not None:
            self.quantization_config = AutoRoundConfig(**stored.config, backend=config.backend)
        model.config.__dict__.pop(QUANTIZATION, None)  # save_pretrained leaves out what else mlx-lm needs
        install_packed_layers(model, stored.layers, biases=stored.biases)
        if experts := [site.name for site in stored.layers if site.expert is not None]:
            self.apart = [
                Unstack(stored.stacks, model.base_model_prefix),
                LeaveAlone(frozenset(experts), model.base_model_prefix),
            ]
        self.relayouts = stored.relayouts
        # groups in order need no index
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), r"\.g_idx$"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.rounding is not None and self.rounding.damaged:
            raise self.rounding.damaged[0]
        if self.plan is not None:
            if self.data is not None:
                model.config.quantization_config = None  # it is a float model still
                calibrate_loaded(model, self.quantization_config, self.plan, self.data)
            config = FORMAT.config(self.plan, self.names)
            self.quantization_config = AutoRoundConfig(**config, backend=self.quantization_config.backend)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                self.packed_layers += (name,)
                module.requires_grad_(False)  # transformers makes float parameters trainable
                if module.scheme in self.relayouts:
                    self._relayout(name, module)
        chooser = assign_backends(model, self.quantization_config.backend)
        if not any(map(holds_packed_experts, model.modules())):  # they look at the router's choice, which breaks a graph
            self.chooser = chooser
        model.config.quantization_config = self.quantization_config
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        kind = dtype or model.config.dtype or torch.float32
        restore_float_layers(model, getattr(torch, kind) if isinstance(kind, str) else kind)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Say yes: a loaded model saves the tensors that it was loaded from."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say yes: packed weights stay as they are, adapters beside them learn."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Say whether `generate` may compile the model, as it does with a static cache on a GPU."""
        return self.chooser is not None and self.chooser.compiles

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Make the config true before it is saved; the tensors are saved as they are."""
        self.name_plain_layers(model)
        return None, {}

    def name_plain_layers(self, model: PreTrainedModel) -> None:
        """Name in `extra_config` what was loaded packed and is a plain layer now, as after merging an adapter."""
        modules, config = dict(model.named_modules()), self.quantization_config
        if plain := [name for name in self.packed_layers if isinstance(modules.get(name), nn.Linear | Conv1D)]:
            entry = BF16.to_dict(read_config(config.to_dict()).scheme)
            config.extra_config = {**(getattr(config, "extra_config", None) or {}), **dict.fromkeys(plain, entry)}

    @torch.no_grad()
    def cast_for_training(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Cast what is not packed; packed layers go on multiplying in their own dtype if it is narrower."""
        for layer in model.modules():
            if isinstance(layer, PackedLinear) and layer.compute_dtype.itemsize < dtype.itemsize:
                layer.product_dtype = layer.compute_dtype
        before = {name: tensor.dtype for name, tensor in _named_tensors(model)}
        nn.Module.to(model, dtype)  # PreTrainedModel.to refuses some quantized models; packed tensors are never cast
        cast = {name: before[name] for name, tensor in _named_tensors(model) if tensor.dtype != before[name]}
        self.cast = cast | self.cast

    @torch.no_grad()
    def undo_cast(self, model: nn.Module) -> None:
        """Undo `cast_for_training`, whether packed layers have become plain ones or not."""
        for name, tensor in _named_tensors(model):
            if name in self.cast:
                tensor.data = tensor.data.to(self.cast[name])
        for layer in model.modules():
            if isinstance(layer, PackedLinear):
                layer.product_dtype = None
        self.cast = {}

    def _relayout(self, name: str, layer: PackedLinear) -> None:
        if layer.device.type == "meta":
            raise UnsupportedLayer(
                f"{name} is offloaded and lies in compressed-tensors' layout, which no kernel reads; load the model without "
                "offloading, save it (in auto_round form) and load that"
            )
        layer.relayout(self.relayouts[layer.scheme])

    @property
    def _needs_data(self) -> bool:
        """Whether the model is calibrated once it is loaded, or rounded while it loads."""
        config = self.quantization_config
        searched = getattr(config, "dataset", None) is not None and not getattr(config, "disable_opt_rtn", False)
        if self.pre_quantized or self.arguments is None:
            return False
        schemes = self.plan.schemes.values() if self.plan else (wanted_scheme(self.arguments),)
        tuned = config.iters or getattr(config, "end_to_end_steps", 0)
        return bool(tuned or searched) or any(map(needs_calibration, schemes))


def _named_tensors(model: nn.Module) -> tuple[tuple[str, torch.Tensor], ...]:
    return (*model.named_parameters(), *model.named_buffers())
