# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli export autoround --model MODEL OUT`: the flags of `hf-autoround`.

optimum finds this file because its own `optimum.commands.register` is a namespace package, imports it at every start of
`optimum-cli`, whatever the command, and asks every command for its flags. So nothing is imported here but optimum's base
classes; the flags, which need no torch either, are made only if this command was named.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class AutoRoundExportCommand(BaseOptimumCLICommand):
    """Quantize a model and write it to a folder."""

    COMMAND = CommandInfo(name="autoround", help="Quantize a language model to 2, 3, 4 or 8 bits with tuned rounding.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Give the command its flags."""
        if "autoround" not in sys.argv:
            return
        from hf_autoround.cli.quantize import add_flags

        parser.description = AutoRoundExportCommand.COMMAND.help
        parser.allow_abbrev = False
        parser.add_argument("output", nargs="?", metavar="OUT", help="Folder for the quantized model, as --output_dir.")
        add_flags(parser, "default")

    def run(self) -> None:
        """Quantize, and end with the exit code of `hf-autoround`."""
        from hf_autoround.cli.main import exit_code
        from hf_autoround.cli.quantize import quantize

        given = {name: value for name, value in vars(self.args).items() if name != "func"}
        output = given.pop("output")
        if (output is None) == (given["output_dir"] is None):
            self.parser.error("one folder to write is needed: OUT, or --output_dir")
        given["output_dir"] = output or given["output_dir"]
        raise SystemExit(exit_code(lambda: quantize(self.parser, given, "default"), self.parser.prog))


REGISTER_COMMANDS = [(AutoRoundExportCommand, ExportCommand)]
