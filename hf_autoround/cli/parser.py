# SPDX-License-Identifier: Apache-2.0
"""An argument parser that suggests the near flag, and help that groups flags by what they are for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from hf_autoround.cli.turns import wait_for_turn
from hf_autoround.registry import suggest


class Parser(argparse.ArgumentParser):
    """argparse with suggestions. Flags are never abbreviated: `--iter` must not silently mean something else one day."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, or exit with 2 naming the near flag."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.unknown(rest[0].partition("=")[0], flags, "flag" if rest[0].startswith("-") else "argument")
        return parsed

    def unknown(self, word: str, known: Iterable[str], kind: str) -> NoReturn:
        """Exit with 2: there is no such word."""
        wait_for_turn()
        print(f"{self.prog}: there is no {kind} {word}{suggest(word, known)}", file=sys.stderr)
        print(f"{self.prog} --help lists them all", file=sys.stderr)
        raise SystemExit(2)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one sentence."""
        wait_for_turn()
        print(f"{self.prog}: {message}\n{self.prog} --help explains the flags", file=sys.stderr)
        raise SystemExit(2)
