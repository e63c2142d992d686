# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause, each one sentence: what was asked, why not, what instead.

The command line prints them without a traceback and exits with 1; from Python they are ordinary exceptions. A broken
invariant of our own is an `assert`, never one of these.
"""

from importlib import import_module
from types import ModuleType


class AutoRoundError(Exception):
    """What a user asked for cannot be done; the message says why and what to do instead."""


class UnsupportedScheme(AutoRoundError):
    """A scheme that does not exist, or that nothing chosen can store."""


class UnsupportedLayer(AutoRoundError):
    """A layer, or a whole architecture, that cannot be quantized as asked."""


class UnknownName(AutoRoundError, KeyError):
    """A name that is in no registry; the message offers the near ones."""

    __str__ = Exception.__str__  # KeyError would print the repr of the sentence


class CalibrationError(AutoRoundError):
    """Calibration data that cannot be read, or does not fit the model."""


class CheckpointError(AutoRoundError):
    """A checkpoint that is missing, damaged or of another kind than expected."""


class OutputError(AutoRoundError):
    """A folder that cannot be written, or that belongs to somebody else."""


class ResumeError(AutoRoundError):
    """An unfinished run that was started with other arguments."""


class MissingDependency(AutoRoundError, ImportError):
    """An optional package that is not installed."""


def require(module: str, *, for_: str, install: str | None = None) -> ModuleType:
    """Import an optional package, or say which `pip install` is missing.

    Raises MissingDependency.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = install or module.partition(".")[0].replace("_", "-")
        raise MissingDependency(f"{for_} needs {package}, which is not installed: pip install {package}") from error
