# SPDX-License-Identifier: Apache-2.0
"""Everything that can be known, and refused, before any work: model, plan, data, folders, disk space."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_autoround import __version__
from hf_autoround.calibration.batches import CalibrationSet, calibration_set
from hf_autoround.calibration.sampling import refuse_sampling
from hf_autoround.errors import AutoRoundError, CalibrationError, CheckpointError, UnsupportedScheme
from hf_autoround.formats import Format, find_formats, reasons_against, refuse_plan
from hf_autoround.models.blocks import ModelParts, model_parts
from hf_autoround.models.loading import LazyModel, open_model
from hf_autoround.models.placement import resolve_placement
from hf_autoround.models.processes import Processes
from hf_autoround.numerics import needs_calibration
from hf_autoround.planning.model_plan import plan_model
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.scheme import SCHEME_KEYS, PerGroup, Scheme, resolve_scheme
from hf_autoround.streams.block_walk import StreamSettings
from hf_autoround.streams.journal import Journal
from hf_autoround.streams.shards import SourceKey, source_keys
from hf_autoround.streams.shares import share_of
from hf_autoround.trainer.arguments import RoundingArguments
from hf_autoround.trainer.output import OutputFolder
from hf_autoround.tuning import SAMPLED_ROWS


@dataclass(frozen=True)
class Run:
    """A run that nothing speaks against. `data` is None if the algorithm needs none."""

    args: RoundingArguments
    lazy: LazyModel
    parts: ModelParts
    plan: QuantPlan
    keys: list[SourceKey]
    output: OutputFolder
    settings: StreamSettings
    processing_class: Any
    data: CalibrationSet | None
    max_shard_size: int

    @property
    def streams_blocks(self) -> bool:
        """Say whether blocks are walked with data, or tensors rounded as they pass by."""
        return self.data is not None

    def for_blocks(self, tokens: Tensor) -> Tensor:
        """Return those of all samples (N, T) by which blocks are decided.

        Sampled texts serve end to end alone, unless there is nothing else. Where rounding is only its start, it sees samples
        of eight times the tokens that it keeps, which decide as well as all (benchmarks/README.md); experts, which see
        a part each, and schemes that have to see data, whose ranges do not change any more, get all.
        """
        assert self.data is not None
        if self.args.end_to_end_steps <= 0:
            return tokens
        tokens = tokens[: len(self.data.tokens) or self.args.nsamples]
        all_count = any(needs_calibration(scheme) for scheme in self.plan.schemes.values())
        if self.args.algorithm == "sign_round" or all_count or any(site.expert is not None for site in self.plan.sites):
            return tokens
        enough = max(8 * SAMPLED_ROWS // tokens.shape[1], self.args.batch_size * self.settings.processes.count, 1)
        every = max(1, len(tokens) // enough)
        return tokens[every // 2 :: every]  # the first of every few choose the best step

    @property
    def kept_per_weight(self) -> float:
        """How many bytes the journal keeps for each quantized weight, at most."""
        if not self.streams_blocks:
            return 0.0
        weights = [scheme.weight for scheme in self.plan.schemes.values() if scheme.weight is not None]
        sizes = [spec.granularity.size for spec in weights if isinstance(spec.granularity, PerGroup)]
        groups = 1 / min(sizes, default=128)  # for each weight
        result = 1 + 8 * groups  # a byte for each code, and what a group has
        if self.args.end_to_end_steps <= 0:
            return result
        tunables = 4 + 12 * groups  # rounding in float32; scale, its start, a zero point
        learned = tunables + 4 + 8 * groups  # and their moments
        # the blocks' results and what they were made with; three best results, two checkpoints, while one replaces another
        kept = 4 * result + (tunables if self.args.iters else 0) + 2 * learned
        if self.args.low_gpu_mem_usage or self.args.residence == "streamed":
            kept += 5 + learned  # weights in float32, and what enters blocks
        return kept

    def tokenizer_to_save(self, given: Any) -> Any:
        """Return the tokenizer that belongs to the checkpoint: the given one, or that of a model in memory; None if the
        model folder's own files are copied."""
        if given is not None or self.lazy.checkpoint.folder is not None:
            return self.processing_class if given is not None else None
        return self.processing_class or find_tokenizer(None, self.lazy.name, trust_remote_code=self.args.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the source; reading every byte of a large checkpoint is done once."""
        return self.lazy.checkpoint.fingerprint()

    def signature(self) -> dict[str, Any]:
        """Return what decides the bytes of the result: a resumed run must have been started with the same."""
        args = self.args
        tuning = {
            name: getattr(args, name)
            for name in (
                "iters", "minmax_lr", "momentum", "enable_adam", "enable_minmax_tuning", "enable_norm_bias_tuning",
                "enable_quanted_input", "disable_opt_rtn", "nblocks", "batch_size", "gradient_accumulate_steps",
                "end_to_end_steps", "end_to_end_lr",
            )
        }  # fmt: skip
        tuning["lr"] = args.tuning().rate if args.iters else args.lr
        return {
            "version": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": self.fingerprint,
            "format": args.format,
            "max_shard_size": self.max_shard_size,
            "scheme": self.plan.scheme.name,
            "layers": self.plan.to_dict(),
            "data": self.data.digest if self.data else None,
            "dataset": self.data.description if self.data else None,
            "seed": args.seed,
            "precision": "float32" if args.disable_amp else "amp",
            "device": self.settings.placement.main.type,
            "processes": self.settings.processes.count,
            **tuning,
        }


def prepare(
    model: str | Path | PreTrainedModel, args: RoundingArguments, train_dataset: Any, processing_class: Any, processes: Processes
) -> Run:
    """Return the run that these arguments mean.

    Raises an AutoRoundError for anything that could not work, before any weight is read.
    """
    formats = tuple(find_formats(args.format))
    if not formats:
        raise AutoRoundError("no format is given; hf-autoround list formats names them")
    scheme = wanted_scheme(args)
    max_shard_size = _bytes(args.max_shard_size)
    placement = resolve_placement(args.device_map, processes.device)
    lazy = open_model(model, trust_remote_code=args.trust_remote_code)
    parts = model_parts(lazy.model)
    placement.refuse_patterns(lazy.model, parts.block_names)
    plan = plan_for(lazy.model, parts, scheme, args, formats, name=lazy.name)
    keys = source_keys(lazy, plan)
    output = OutputFolder(Path(args.output_dir).expanduser(), formats)
    output.refuse_other_files()  # before data is fetched; a run that starts refuses finished ones too
    needs_data = args.needs_data or any(needs_calibration(scheme) for scheme in plan.schemes.values())
    if processing_class is not None or needs_data:
        source = lazy.checkpoint.folder or lazy.name
        processing_class = find_tokenizer(processing_class, source, trust_remote_code=args.trust_remote_code)
    data = None
    if needs_data:
        dataset = args.dataset if train_dataset is None else train_dataset
        try:
            data = calibration_data(lazy.model, args, dataset, processing_class)
        except CalibrationError as error:
            if args.needs_data:
                raise
            raise CalibrationError(f"{scheme.name} has to see data even to round to nearest: {error}") from error
        if data.sampled is not None and Journal(output.journal, {}).get_sampled() is None:
            reason = refuse_sampling(lazy, data.sampled.seqlen, placement)
            if reason:
                raise CalibrationError(
                    f"no text can be sampled from {lazy.name}: {reason}; use self_samples=0, and no self in dataset"
                )
        share_of(data.samples, args.batch_size, processes)  # raises if there is not enough for all of them
    settings = StreamSettings(
        nblocks=args.nblocks,
        seed=args.seed,
        placement=placement,
        processes=processes,
        quantized_inputs=args.enable_quanted_input,
        keep_on_cpu=args.low_gpu_mem_usage,
        amp=not args.disable_amp,
        sampled_rows=SAMPLED_ROWS if args.algorithm == "opt_rtn" else 0,
    )
    return Run(args, lazy, parts, plan, keys, output, settings, processing_class, data, max_shard_size)


def wanted_scheme(args: RoundingArguments) -> Scheme:
    """Return the base scheme that arguments ask for.

    Raises UnknownName, or UnsupportedScheme if it leaves nothing to quantize.
    """
    scheme = resolve_scheme(args.scheme, **{key: getattr(args, key) for key in SCHEME_KEYS})
    if scheme.weight is None and not args.layer_config:
        raise UnsupportedScheme(f"{scheme.name} leaves every layer as it is: there is nothing to quantize")
    return scheme


def plan_for(
    model: PreTrainedModel, parts: ModelParts, scheme: Scheme, args: RoundingArguments, formats: Sequence[Format], *, name: str
) -> QuantPlan:
    """Return the plan for a model (on the meta device is enough) that all formats can store; `name` is what to call it.

    Raises UnsupportedLayer, UnsupportedScheme or UnknownName.
    """
    plan = plan_model(
        model,
        parts,
        scheme,
        name=name,
        layer_config=args.layer_config,
        ignore_layers=args.ignore_layers,
        quant_lm_head=args.quant_lm_head,
        refuse=lambda site, chosen: reasons_against(formats, site, chosen),
    )
    refuse_plan(formats, plan)
    return plan


def calibration_data(model: PreTrainedModel, args: RoundingArguments, dataset: Any, tokenizer: Any) -> CalibrationSet:
    """Return the samples that a dataset gives for a model.

    Raises CalibrationError for data that cannot be read, or does not fit the model.
    """
    config = model.config.get_text_config()
    return calibration_set(
        dataset,
        tokenizer,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        vocabulary=config.vocab_size,
        longest=getattr(config, "max_position_embeddings", None),
        seed=args.seed,
        self_samples=args.self_samples,
    )


def find_tokenizer(given: Any, source: str | Path, *, trust_remote_code: bool) -> Any:
    """Return the given tokenizer, loaded if it is a folder or a Hub id, or that of the model; None if the model has none.

    `source` is the model's folder (a Path), or what else it is called: then it need not be a place at all.
    Raises CheckpointError if there is a tokenizer and it cannot be loaded.
    """
    if given is not None and not isinstance(given, str | Path):
        return given
    if given is None and isinstance(source, Path) and not any(source.glob("tokenizer*")) and not any(source.glob("*.model")):
        return None
    place = source if given is None else given
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if given is None and not isinstance(source, Path):
            return None  # token ids need none; texts are refused by name
        what = f"the tokenizer of {place}" if given is None else f"the tokenizer {place}"
        raise CheckpointError(f"{what} cannot be loaded: {str(error).splitlines()[0]}") from error


def _bytes(size: str | int) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    value = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if value < 1:
        raise AutoRoundError(f"max_shard_size={size!r} is no size; write it as 5GB or 500MB")
    return int(value)
