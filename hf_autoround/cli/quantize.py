# SPDX-License-Identifier: Apache-2.0
"""`hf-autoround [quantize] --model ...`: the flags are the fields of RoundingArguments.

Torch is loaded when work starts, not for help.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging as python_logging
import sys
from collections.abc import Sequence
from typing import Any

from hf_autoround import __version__
from hf_autoround.cli.parser import Parser
from hf_autoround.trainer.arguments import RECIPES, RoundingArguments
from hf_autoround.trainer.arguments import recipe as recipe_arguments

_GROUPS = {
    "what to write": ("output_dir", "format", "max_shard_size", "hub_model_id", "hub_private_repo"),
    "numbers": (
        "scheme", "bits", "group_size", "data_type", "act_bits", "act_group_size", "act_data_type", "layer_config",
        "ignore_layers", "quant_lm_head",
    ),
    "tuning": (
        "iters", "disable_opt_rtn", "lr", "minmax_lr", "momentum", "enable_adam", "enable_minmax_tuning",
        "enable_norm_bias_tuning", "enable_quanted_input", "nblocks", "batch_size", "gradient_accumulate_steps", "seed",
    ),
    "tuning end to end": ("end_to_end_steps", "end_to_end_lr", "residence", "save_steps"),
    "calibration data": ("dataset", "nsamples", "self_samples", "seqlen"),
    "machine": ("device_map", "low_gpu_mem_usage", "disable_amp", "trust_remote_code"),
    "watching": ("logging_steps", "report_to", "run_name", "disable_tqdm"),
}  # fmt: skip

_FALSE = (  # flags that say no to what the scheme says
    ("--asym", "sym", "Grid with zero points instead of a symmetric one."),
    ("--act_asym", "act_sym", "Inputs get a grid with zero points instead of a symmetric one."),
    ("--disable_act_dynamic", "act_dynamic", "Ranges of inputs come from calibration."),
)


def parser(recipe: str, description: str, epilog: str) -> Parser:
    """Return the parser of a recipe's command: its defaults are the recipe's."""
    name = "hf-autoround" if recipe == "default" else f"hf-autoround-{recipe}"
    flags = Parser(prog=name, description=description, epilog=epilog, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--version", action="version", version=f"hf-autoround {__version__}")
    flags.add_argument("model_positional", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    add_flags(flags, recipe)
    return flags


def add_flags(flags: argparse.ArgumentParser, recipe: str) -> None:
    """Give a parser the flags of a recipe's command."""
    flags.add_argument("--model", help="Model folder or Hub id to quantize.")
    flags.add_argument(
        "--resume", action="store_true", help="Go on with the unfinished run in --output_dir, or start if there is none."
    )
    flags.add_argument("--push_to_hub", action="store_true", help="Upload the result to --hub_model_id.")
    defaults = RECIPES[recipe]
    by_name = {item.name: item for item in dataclasses.fields(RoundingArguments)}
    for title, names in _GROUPS.items():
        group = flags.add_argument_group(title)
        for field_name in names:
            _add(group, by_name[field_name], defaults)
        if title == "numbers":
            for flag, name, text in _FALSE:
                group.add_argument(flag, dest=name, action="store_false", default=None, help=text)


def run(words: Sequence[str], recipe: str, description: str, epilog: str) -> int:
    """Quantize as the words say; return the exit code."""
    flags = parser(recipe, description, epilog)
    given = vars(flags.parse_args(list(words)))
    positional = given.pop("model_positional")
    if positional and given["model"]:
        flags.unknown(positional, [], "argument")
    given["model"] = given["model"] or positional
    return quantize(flags, given, recipe)


def quantize(flags: argparse.ArgumentParser, given: dict[str, Any], recipe: str) -> int:
    """Quantize as the parsed flags say; return the exit code."""
    model, resume, push = given.pop("model"), given.pop("resume"), given.pop("push_to_hub")
    if model is None:
        flags.error("--model is needed: a model folder or a Hub id")
    values = {name: value for name, value in given.items() if value is not None}
    args = recipe_arguments(recipe, **values)
    if push and args.hub_model_id is None:
        flags.error("--push_to_hub needs --hub_model_id")
    from hf_autoround.models.processes import leave
    from hf_autoround.trainer.trainer import RoundingTrainer

    show_progress_lines()
    trainer = RoundingTrainer(model, args)
    trainer.train(resume_from_checkpoint=resume)
    main = trainer.processes.main
    if main:
        print(f"written to {trainer.prepare().output.folder}")
    if push:
        address = trainer.push_to_hub()
        if main:
            print(f"uploaded to {address}")
    leave()
    return 0


def show_progress_lines() -> None:
    """Let our log lines through to standard error, and transformers' only from warnings on."""
    from transformers.utils import logging

    logging.set_verbosity_warning()
    ours = python_logging.getLogger("hf_autoround")
    if not ours.handlers:
        handler = python_logging.StreamHandler(sys.stderr)
        handler.setFormatter(python_logging.Formatter("%(message)s"))
        ours.addHandler(handler)
        ours.propagate = False
    ours.setLevel(python_logging.INFO)


def _add(group: Any, item: dataclasses.Field, recipe: dict[str, Any]) -> None:
    flag, text = f"--{item.name}", item.metadata["help"]
    default = recipe.get(item.name, item.default)
    shown = "" if default in (None, False, dataclasses.MISSING) or "default" in text else f" [{default}]"
    aliases = ["--fp_layers"] if item.name == "ignore_layers" else []
    kind = str(item.type)
    if kind.startswith("bool"):
        if item.default is True:
            flag_type = argparse.BooleanOptionalAction
            group.add_argument(flag, action=flag_type, default=None, help=text)
        else:
            group.add_argument(flag, action="store_true", default=None, help=text)
    elif item.name in ("report_to",):
        group.add_argument(flag, nargs="+", default=None, help=text)
    elif kind.startswith("int"):
        group.add_argument(flag, type=int, default=None, metavar="N", help=text + shown)
    elif kind.startswith("float"):
        group.add_argument(flag, type=float, default=None, metavar="X", help=text + shown)
    else:
        group.add_argument(flag, *aliases, default=None, metavar="TEXT", help=text + shown)
