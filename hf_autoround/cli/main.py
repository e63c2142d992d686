# SPDX-License-Identifier: Apache-2.0
"""`hf-autoround`: subcommands, exit codes, and errors without tracebacks.

0: done. 1: it could not be done. 2: the command was not understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from hf_autoround import __version__
from hf_autoround.cli.parser import Parser
from hf_autoround.cli.turns import several, wait_for_turn
from hf_autoround.errors import AutoRoundError

_COMMANDS = ("quantize", "list", "demo")
_DESCRIPTION = "Quantize language models to 2, 3, 4 or 8 bits with rounding tuned by gradient descent."
_EPILOG = """commands:
  hf-autoround --model MODEL --scheme W4A16 --output_dir OUT    quantize (the word `quantize` may stand first)
  hf-autoround list formats | schemes | backends                what there is
  hf-autoround demo                                             train a tiny model, quantize it, compare

recipes: hf-autoround, hf-autoround-best (5 times the steps), hf-autoround-light (a quarter of them),
  hf-autoround-opt-rtn (scales searched, errors cancelled, nothing tuned), hf-autoround-rtn (round to nearest, no data),
  hf-autoround-e2e (all blocks tuned together against the float model's predictions), -e2e-light, -e2e-best"""


def main(arguments: Sequence[str] | None = None, recipe: str = "default") -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _run(words, recipe), "hf-autoround")


def exit_code(run: Callable[[], int], program: str) -> int:
    """Run what returns an exit code; what a user did wrong becomes a sentence and 1."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except AutoRoundError as error:
        wait_for_turn()
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        wait_for_turn()
        print(f"{program}: interrupted; --resume goes on with what is finished", file=sys.stderr)
        return 1


def best() -> int:
    """Run `hf-autoround-best`."""
    return main(recipe="best")


def light() -> int:
    """Run `hf-autoround-light`."""
    return main(recipe="light")


def e2e() -> int:
    """Run `hf-autoround-e2e`."""
    return main(recipe="e2e")


def e2e_best() -> int:
    """Run `hf-autoround-e2e-best`."""
    return main(recipe="e2e-best")


def e2e_light() -> int:
    """Run `hf-autoround-e2e-light`."""
    return main(recipe="e2e-light")


def opt_rtn() -> int:
    """Run `hf-autoround-opt-rtn`."""
    return main(recipe="opt-rtn")


def rtn() -> int:
    """Run `hf-autoround-rtn`."""
    return main(recipe="rtn")


def _run(words: list[str], recipe: str) -> int:
    if words[:1] == ["--version"]:
        print(f"hf-autoround {__version__}")
        return 0
    if not words:
        from hf_autoround.cli.quantize import parser

        wait_for_turn()
        parser(recipe, _DESCRIPTION, _EPILOG).print_usage(sys.stderr)
        print("hf-autoround: --model is needed; hf-autoround --help explains", file=sys.stderr)
        return 2
    command = words[0]
    if command == "list":
        from hf_autoround.cli.list_registries import run

        return run(words[1:])
    if command == "demo":
        if several():
            raise AutoRoundError("the demo is for one process; start it without torchrun")
        from hf_autoround.cli.demo import run

        return run(words[1:])
    if not command.startswith("-") and command != "quantize" and "/" not in command and "." not in command:
        if not any(word.startswith("-") for word in words):
            root = Parser(
                prog="hf-autoround", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawTextHelpFormatter
            )
            root.unknown(command, _COMMANDS, "command")
    from hf_autoround.cli.quantize import run

    return run(words[1:] if command == "quantize" else words, recipe, _DESCRIPTION, _EPILOG)
