# SPDX-License-Identifier: Apache-2.0
"""Giving memory back to the system.

glibc keeps freed memory for itself; after a block has left, `malloc_trim` hands it over. Without it the resident size
grows with the number of blocks although nothing refers to them any more. Reference cycles are left to Python: nothing
here makes any, and a full collection takes a third of a second once transformers is loaded.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h


def release_memory() -> None:
    """Return freed host memory to the system (Linux), and cached device memory to the device."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # musl has no malloc_trim and needs none
            return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # newer than the oldest torch
        if empty_host_cache is not None:
            empty_host_cache()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep what is freed inside, until `release_memory`, for a loop that asks for the same again in each step.

    Otherwise the end of its heap comes and goes, and each fresh page costs a fault: a tenth of the CPU time of tuning a small
    model. It is left at the thresholds that its own rules end with.
    """
    _mallopt(_MMAP_THRESHOLD, 32 << 20)
    _mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        _mallopt(_TRIM_THRESHOLD, 64 << 20)


def _mallopt(option: int, value: int) -> None:
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").mallopt(option, value)
        except (OSError, AttributeError):  # musl
            return
