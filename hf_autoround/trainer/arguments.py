# SPDX-License-Identifier: Apache-2.0
"""Everything a run can be told, as one dataclass: the command line's flags and the trainer's arguments are the same thing.

It is no subclass of TrainingArguments (116 fields, most of them meaningless here); it has the attributes that
transformers' callbacks and reporting integrations read. Names follow the `auto-round` tool where it has one.

Importing it loads no torch: the command lines show their help at once.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_autoround.errors import AutoRoundError, UnknownName
from hf_autoround.registry import suggest

if TYPE_CHECKING:
    from hf_autoround.tuning import TuningSettings
    from hf_autoround.tuning.end_to_end import EndToEndSettings

# iters, samples, length: what the recipes of the auto-round tool ask for; those end to end are ours (benchmarks/README.md).
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"iters": 200, "nsamples": 128, "seqlen": 2048},
    "best": {"iters": 1000, "nsamples": 512, "seqlen": 2048},
    "light": {"iters": 50, "nsamples": 128, "seqlen": 2048},
    "opt-rtn": {"iters": 0, "nsamples": 128, "seqlen": 2048},
    "e2e": {"iters": 0, "end_to_end_steps": 250, "self_samples": 256, "nsamples": 128, "seqlen": 2048},
    "e2e-light": {"iters": 0, "end_to_end_steps": 50, "nsamples": 128, "seqlen": 2048},
    "e2e-best": {"iters": 0, "end_to_end_steps": 1000, "self_samples": 512, "nsamples": 128, "seqlen": 2048, "batch_size": 6},
    "rtn": {"iters": 0, "nsamples": 128, "seqlen": 2048, "disable_opt_rtn": True},
}

Algorithm = Literal["sign_round", "opt_rtn", "rtn"]
Residence = Literal["auto", "resident", "streamed"]


def _help(text: str, **default: Any) -> Any:
    return field(metadata={"help": text}, **default)


@dataclass
class RoundingArguments:
    """Arguments of a RoundingTrainer.

    Raises AutoRoundError for values that cannot be meant.
    """

    output_dir: str = _help(
        "Folder for the quantized model; it must be empty, or hold an unfinished run.", default="autoround_output"
    )
    scheme: str = _help("Scheme of every layer: `hf-autoround list schemes`.", default="W4A16")
    bits: int | None = _help("Bits of a weight, 2 to 8; overrides the scheme's.", default=None)
    group_size: int | None = _help("Inputs that share a scale, -1 for whole rows; overrides the scheme's.", default=None)
    sym: bool | None = _help("Symmetric grid (True) or one with zero points (False); overrides the scheme's.", default=None)
    data_type: str | None = _help("Numbers of a weight: int, fp, mx_fp, mx_int, nv_fp; overrides the scheme's.", default=None)
    act_bits: int | None = _help("Bits of a layer's inputs at run time, 16 leaves them; overrides the scheme's.", default=None)
    act_group_size: int | None = _help(
        "Inputs of a token that share a scale, -1 for all of them, 0 for all tokens; default the weights'.", default=None
    )
    act_sym: bool | None = _help("Symmetric grid for inputs or not; default as the weights.", default=None)
    act_data_type: str | None = _help("Numbers of inputs; default the weights'.", default=None)
    act_dynamic: bool | None = _help("Ranges of inputs are found at run time, or (False) by calibration.", default=None)
    layer_config: dict[str, Any] | None = _help(
        "Schemes of single layers: {name, part of a name or regular expression: preset or dict}.", default=None
    )
    ignore_layers: list[str] = _help(
        "Layers to leave in 16 bits: names, parts of names, regular expressions.", default_factory=list
    )
    quant_lm_head: bool = _help("Quantize the output head too (not possible if it is tied to the embedding).", default=False)
    format: str = _help("Formats to write, comma-separated: `hf-autoround list formats`.", default="auto_round")

    iters: int = _help("Tuning steps per block; 0: scales searched, errors cancelled (optimized round to nearest).", default=200)
    disable_opt_rtn: bool = _help(
        "With iters 0: plain round to nearest, which needs no data (NVFP4 and FP8_STATIC do).", default=False
    )
    lr: float | None = _help("Rate of the rounding, default 0.2 / sqrt(iters), of the sign step 1 / iters.", default=None)
    minmax_lr: float | None = _help("Rate of the scales, default the rounding's, less at more bits.", default=None)
    enable_adam: bool = _help(
        "Move rounding and scales by Adam; False: by the gradient's sign, farther from the float model.", default=True
    )
    momentum: float = _help("Momentum of the sign step.", default=0.0)
    enable_minmax_tuning: bool = _help("Tune scales as well as rounding.", default=True)
    enable_norm_bias_tuning: bool = _help("Tune norm weights and biases as well.", default=True)
    enable_quanted_input: bool = _help("Tune each block on what the quantized blocks before it produce.", default=True)
    nblocks: int = _help("Blocks tuned together.", default=1)
    batch_size: int = _help("Samples per step.", default=8)
    gradient_accumulate_steps: int = _help("Batches per step.", default=1)

    end_to_end_steps: int = _help(
        "Steps on all blocks together, towards the float model's predictions, after the blocks' own; 0 for none.", default=0
    )
    end_to_end_lr: float | None = _help("Rate of the rounding there, default 0.36 / sqrt(steps * blocks).", default=None)
    residence: Residence = _help(
        "Where all blocks are kept for it: resident (on the device), streamed (in host memory or mapped files, one "
        "block on the device), or auto: what fits.",
        default="auto",
    )
    save_steps: int = _help("Keep an unfinished end to end run on disk every so many steps.", default=50)

    dataset: str | None = _help(
        "Calibration data: a Hub name, a text, json, jsonl or parquet file, pydoc, or self (text that the model writes); several "
        "with commas, with options: pile.jsonl:num=64,self:num=256. Default NeelNanda/pile-10k.",
        default=None,
    )
    nsamples: int = _help("Calibration samples.", default=128)
    self_samples: int = _help("Samples besides that the float model itself writes, for end to end tuning.", default=0)
    seqlen: int = _help("Tokens of a sample.", default=2048)
    seed: int = _help("Seed of the order of samples.", default=42)

    device_map: Any = _help('Device(s) to tune on: cpu, 0, "0,1", auto, or a dict of layer name patterns.', default=None)
    low_gpu_mem_usage: bool = _help("Keep activations in host memory.", default=False)
    disable_amp: bool = _help("Compute in float32 instead of bfloat16.", default=False)
    max_shard_size: str = _help("Largest weight file.", default="5GB")
    trust_remote_code: bool = _help("Run the code that a model brings along.", default=False)
    resume_from_checkpoint: bool = _help("Go on with the unfinished run in output_dir, or start if there is none.", default=False)

    logging_steps: float = _help("Log the loss every so many steps.", default=50)
    report_to: list[str] = _help("Where to report: tensorboard, wandb, ...", default_factory=list)
    run_name: str | None = _help("Name of the run for reports.", default=None)
    disable_tqdm: bool = _help("No progress bar.", default=False)
    hub_model_id: str | None = _help("Repository for push_to_hub.", default=None)
    hub_private_repo: bool | None = _help("Make that repository private.", default=None)

    # read by transformers' callbacks and integrations; nobody sets them here. Strategies equal transformers' enums
    logging_strategy: Any = field(default="steps", init=False)
    logging_first_step: bool = field(default=False, init=False)
    save_strategy: Any = field(default="epoch", init=False)
    save_total_limit: int | None = field(default=None, init=False)
    eval_strategy: Any = field(default="no", init=False)
    eval_steps: float | None = field(default=None, init=False)
    eval_delay: float = field(default=0, init=False)
    load_best_model_at_end: bool = field(default=False, init=False)
    metric_for_best_model: str | None = field(default=None, init=False)
    greater_is_better: bool | None = field(default=None, init=False)
    do_eval: bool = field(default=False, init=False)
    project: str = field(default="huggingface", init=False)
    n_gpu: int = field(default=0, init=False)
    process_index: int = field(default=0, init=False)
    world_size: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        self.report_to = [] if self.report_to == ["none"] else self.report_to
        if isinstance(self.ignore_layers, str):
            self.ignore_layers = [name.strip() for name in self.ignore_layers.split(",") if name.strip()]
        for name, least in (
            ("iters", 0),
            ("nblocks", 1),
            ("batch_size", 1),
            ("gradient_accumulate_steps", 1),
            ("nsamples", 1),
            ("self_samples", 0),
            ("end_to_end_steps", 0),
            ("save_steps", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise AutoRoundError(f"{name}={value!r}: it has to be a whole number, {least} or more")
        for name in ("lr", "minmax_lr", "end_to_end_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise AutoRoundError(f"{name}={value!r}: a rate has to be above 0; leave it out for the default")
        if self.residence not in get_args(Residence):
            near = suggest(str(self.residence), get_args(Residence))
            raise UnknownName(f"residence={self.residence!r}: it is {', '.join(get_args(Residence))}{near}")
        if not 0 <= self.momentum < 1:
            raise AutoRoundError(f"momentum={self.momentum!r}: it has to be from 0 to below 1")
        if self.momentum and self.enable_adam and self.iters:
            raise AutoRoundError(
                f"momentum={self.momentum!r}: it belongs to the sign step, and Adam has its own; "
                "add enable_adam=False (--no-enable_adam) to tune by the sign"
            )

    @property
    def algorithm(self) -> Algorithm:
        """Which of the three algorithms these arguments mean."""
        if self.iters:
            return "sign_round"
        return "rtn" if self.disable_opt_rtn else "opt_rtn"

    @property
    def needs_data(self) -> bool:
        """Whether there is more to do than to round each weight as it passes by."""
        return self.algorithm != "rtn" or self.end_to_end_steps > 0

    def tuning(self) -> TuningSettings:
        """Return what the algorithm needs to know."""
        from hf_autoround.tuning import TuningSettings

        return TuningSettings(
            iters=self.iters,
            batch_size=self.batch_size,
            gradient_accumulate_steps=self.gradient_accumulate_steps,
            lr=self.lr,
            minmax_lr=self.minmax_lr,
            momentum=self.momentum,
            enable_adam=self.enable_adam,
            enable_minmax_tuning=self.enable_minmax_tuning,
            enable_norm_bias_tuning=self.enable_norm_bias_tuning,
            keep_tunables=self.end_to_end_steps > 0,
        )

    def end_to_end(self, blocks: int) -> EndToEndSettings:
        """Return what the end to end stage needs to know for a model of so many blocks.

        The rate by default is best, or near it, for models of 2, 4 and 6 blocks (benchmarks/README.md).
        """
        from hf_autoround.tuning.end_to_end import EndToEndSettings

        return EndToEndSettings(
            steps=self.end_to_end_steps,
            batch_size=self.batch_size,
            gradient_accumulate_steps=self.gradient_accumulate_steps,
            lr=self.end_to_end_lr or 0.36 / (self.end_to_end_steps * blocks) ** 0.5,
            tunes_range=self.enable_minmax_tuning,
            tunes_norms=self.enable_norm_bias_tuning,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as JSON values, for callbacks that record them."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: getattr(value, "value", value) for name, value in values.items()}

    def to_json_string(self) -> str:
        """Return the arguments as JSON text."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return the arguments as plain scalars, for reporting integrations."""
        return {name: value if type(value) in (bool, int, float, str) else str(value) for name, value in self.to_dict().items()}


def recipe(name: str, **overrides: Any) -> RoundingArguments:
    """Return the arguments of a recipe with some of them replaced.

    Raises UnknownName for a recipe or an argument that does not exist.
    """
    if name not in RECIPES:
        raise UnknownName(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    known = [item.name for item in dataclasses.fields(RoundingArguments) if item.init]
    for key in overrides:
        if key not in known:
            raise UnknownName(f"there is no argument {key!r}{suggest(key, known)}")
    return RoundingArguments(**{**RECIPES[name], **overrides})
