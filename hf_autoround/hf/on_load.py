# SPDX-License-Identifier: Apache-2.0
"""Quantizing a float checkpoint inside `from_pretrained`: each weight as it streams in, or the loaded model block by block.

Round to nearest goes through transformers' own loader: a packed layer keeps its float parameter on the meta device for the
loader to find, and the operation below turns what is loaded into the layer's packed tensors. One parameter is in memory
at a time. Everything that needs data needs the whole float model, and is a RoundingTrainer's work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import ConversionOps

from hf_autoround.calibration.batches import CalibrationSet, calibration_set
from hf_autoround.errors import CheckpointError
from hf_autoround.formats import AutoRoundFormat, reasons_against
from hf_autoround.hf.config import AutoRoundConfig
from hf_autoround.hf.packed_model import by_parameter, drop_parameter, install_packed_layers
from hf_autoround.layers.sites import QuantizedLayer, WeightSite
from hf_autoround.layouts import Layout
from hf_autoround.models.blocks import model_parts
from hf_autoround.models.loading import refuse_model_type
from hf_autoround.planning.model_plan import plan_model
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import resolve_scheme
from hf_autoround.streams.block_walk import units
from hf_autoround.streams.shards import refuse_not_finite
from hf_autoround.trainer.arguments import RoundingArguments
from hf_autoround.trainer.trainer import RoundingTrainer
from hf_autoround.tuning import TunableWeight
from hf_autoround.tuning.rtn import nearest

FORMAT = AutoRoundFormat()


def plan_on_load(model: PreTrainedModel, args: RoundingArguments) -> QuantPlan:
    """Return the plan for a float model that is about to be loaded (its weights are on the meta device).

    Raises an AutoRoundError for what cannot be quantized as asked.
    """
    name = model.name_or_path or type(model).__name__
    refuse_model_type(model.config, name)
    return plan_model(
        model,
        model_parts(model),
        resolve_scheme(args.scheme, bits=args.bits, group_size=args.group_size, sym=args.sym),
        name=name,
        layer_config=args.layer_config,
        ignore_layers=args.ignore_layers,
        quant_lm_head=args.quant_lm_head,
        refuse=lambda site, scheme: reasons_against((FORMAT,), site, scheme),
    )


class RoundWhileLoading(ConversionOps):
    """transformers' loader calls `convert` with each float parameter and places what it returns.

    It makes a new operation for each. What is found damaged goes into `damaged`: an error raised here would come out as
    transformers' own, without its sentence.
    """

    def __init__(self, plan: QuantPlan, damaged: list[CheckpointError]) -> None:
        self.plan, self.damaged = plan, damaged
        self.sites = by_parameter(plan.sites)
        self.layout = FORMAT.layout(plan)

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the packed tensors of every site in these parameters, by full name."""
        assert model is not None and missing_keys is not None
        packed: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            try:
                refuse_not_finite(name, weight)
            except CheckpointError as error:
                self.damaged.append(error)
            sites = self.sites[name]
            result = nearest(TunableWeight(weight, sites[0].transposed, self.plan.schemes[sites[0].name]))
            packed |= {f"{site.name}.{leaf}": tensor for site, leaf, tensor in _packed(result, sites, self.plan, self.layout)}
            drop_parameter(model, name)
            missing_keys.discard(name)
        return packed


def calibration_data(model: PreTrainedModel, config: AutoRoundConfig, args: RoundingArguments) -> CalibrationSet:
    """Return the samples that `config.dataset` gives.

    Raises CalibrationError for data that cannot be read, or does not fit the model.
    """
    text_config = model.config.get_text_config()
    return calibration_set(
        getattr(config, "dataset", None),
        getattr(config, "tokenizer", None) or _tokenizer(model),
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        vocabulary=text_config.vocab_size,
        longest=getattr(text_config, "max_position_embeddings", None),
        seed=args.seed,
    )


def calibrate_loaded(model: PreTrainedModel, config: AutoRoundConfig, plan: QuantPlan, data: CalibrationSet) -> None:
    """Tune (or search the scales of) a float model that is in memory, and put packed layers in place of its own.

    The model has to be whole and on one device.
    """
    layout = FORMAT.layout(plan)
    schemes = {name: scheme for name, (scheme, _) in plan.parameters().items()}
    with tempfile.TemporaryDirectory(prefix="hf_autoround-") as folder:
        trainer = RoundingTrainer(model, config.arguments(f"{folder}/out"), train_dataset=data)
        journal = trainer.quantize()
        for unit in units(trainer.prepare().parts, plan, trainer.args.nblocks):
            result = journal.get(unit.key, schemes)
            for name, tuned in result.tuned.items():
                model.get_parameter(name).data.copy_(tuned)
            for name, layer in result.layers.items():
                device = model.get_parameter(name).device
                sites = [site for site in plan.sites if site.parameter == name]
                install_packed_layers(model, {site: (plan.schemes[site.name], layout) for site in sites})
                for site, leaf, tensor in _packed(layer, sites, plan, layout):
                    packed = nn.Parameter(tensor.to(device), requires_grad=False)
                    model.get_submodule(site.name).register_parameter(leaf, packed)


def _packed(
    result: QuantizedLayer, sites: Iterable[WeightSite], plan: QuantPlan, layout: Layout
) -> Iterator[tuple[WeightSite, str, Tensor]]:
    """Yield (site, name inside the layer, tensor) for every packed tensor of a parameter's sites."""
    for site in sites:
        spec = plan.schemes[site.name].weight
        assert spec is not None
        for leaf, tensor in layout.pack(result.at(site).tensor, spec, result.columns).items():
            yield site, leaf, tensor


def _tokenizer(model: PreTrainedModel) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        return None  # token ids need none; texts are refused by name
