# SPDX-License-Identifier: Apache-2.0
"""Quantizing a float checkpoint inside `from_pretrained`: each weight as it streams in, or the loaded model block by block.

Round to nearest goes through transformers' own loader: a packed layer keeps its float parameter on the meta device for the
loader to find, and the operation below turns what is loaded into the layer's packed tensors. One parameter is in memory
at a time. Everything that needs data needs the whole float model, and is a RoundingTrainer's work.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from hf_autoround.calibration.batches import CalibrationSet
from hf_autoround.errors import CheckpointError
from hf_autoround.formats import AutoRoundFormat
from hf_autoround.formats.base import packed_tensors
from hf_autoround.hf.config import AutoRoundConfig
from hf_autoround.hf.packed_model import by_parameter, drop_parameter, install_packed_layers
from hf_autoround.layers.sites import QuantizedLayer, oriented
from hf_autoround.models.blocks import model_parts
from hf_autoround.models.loading import refuse_model_type
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.streams.block_walk import units
from hf_autoround.streams.shards import refuse_not_finite
from hf_autoround.trainer.arguments import RoundingArguments
from hf_autoround.trainer.run import calibration_data, find_tokenizer, plan_for, wanted_scheme
from hf_autoround.trainer.trainer import RoundingTrainer
from hf_autoround.tuning import TunableWeight
from hf_autoround.tuning.rtn import nearest

FORMAT = AutoRoundFormat()


def plan_on_load(model: PreTrainedModel, args: RoundingArguments) -> QuantPlan:
    """Return the plan for a float model that is about to be loaded (its weights are on the meta device).

    Raises an AutoRoundError for what cannot be quantized as asked.
    """
    scheme, name = wanted_scheme(args), model.name_or_path or type(model).__name__
    refuse_model_type(model.config, name)
    return plan_for(model, model_parts(model), scheme, args, (FORMAT,), name=name)


class RoundWhileLoading(ConversionOps):
    """transformers' loader calls `convert` with each float parameter and places what it returns.

    One does for all parameters of a model: it holds what the plan says of them. What is found damaged goes into `damaged`:
    an error raised here would come out as transformers' own, without its sentence.
    """

    def __init__(self, plan: QuantPlan) -> None:
        self.plan = plan
        self.sites = by_parameter(plan.sites)
        self.damaged: list[CheckpointError] = []

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the packed tensors of every site in these parameters, by full name."""
        assert model is not None and missing_keys is not None
        packed: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            for site in self.sites[name]:  # of fused experts one at a time: what rounding needs is as large as one of them
                part = site.part(oriented(weight, site.transposed))
                try:
                    refuse_not_finite(site.name, part)
                except CheckpointError as error:
                    self.damaged.append(error)
                layer = nearest(TunableWeight(part, False, self.plan.schemes[site.name]))
                packed |= {f"{site.name}.{leaf}": tensor for leaf, tensor in _packed(layer, self.plan).items()}
            drop_parameter(model, name)
            missing_keys.discard(name)
        return packed


def data_on_load(model: PreTrainedModel, config: AutoRoundConfig, args: RoundingArguments) -> CalibrationSet:
    """Return the samples that `config.dataset` gives.

    Raises CalibrationError for data that cannot be read, or does not fit the model, CheckpointError for such a tokenizer.
    """
    given, trusted = getattr(config, "tokenizer", None), args.trust_remote_code
    tokenizer = find_tokenizer(given, model.name_or_path, trust_remote_code=trusted)
    return calibration_data(model, args, getattr(config, "dataset", None), tokenizer)


def calibrate_loaded(model: PreTrainedModel, config: AutoRoundConfig, plan: QuantPlan, data: CalibrationSet) -> None:
    """Tune (or search the scales of) a float model that is in memory, and put packed layers in place of its own.

    The model has to be whole and on one device.
    """
    sites_of = by_parameter(plan.sites)
    schemes = {name: scheme for name, (scheme, _) in plan.parameters().items()}
    with tempfile.TemporaryDirectory(prefix="hf_autoround-") as folder:
        trainer = RoundingTrainer(model, config.arguments(f"{folder}/out"), train_dataset=data)
        journal = trainer.quantize()
        for unit in units(trainer.prepare().parts, plan, trainer.args.nblocks):
            # the journal is in the main process' folder
            result = trainer.processes.from_main(partial(journal.get, unit.key, schemes))
            for name, tuned in result.tuned.items():
                model.get_parameter(name).data.copy_(tuned)
            for name, layer in result.layers.items():
                device = model.get_parameter(name).device
                layout = FORMAT.layout(plan, schemes[name])
                install_packed_layers(model, {site: (schemes[name], layout) for site in sites_of[name]})
                for site in sites_of[name]:
                    packed_layer = model.get_submodule(site.name)
                    for leaf, tensor in _packed(layer.at(site), plan).items():
                        packed_layer.register_parameter(leaf, nn.Parameter(tensor.to(device), requires_grad=False))


def _packed(layer: QuantizedLayer, plan: QuantPlan) -> dict[str, Tensor]:
    """Return the packed tensors of one site's result, by name inside the layer."""
    return packed_tensors(FORMAT.layout(plan, layer.scheme), layer)
