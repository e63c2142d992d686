# SPDX-License-Identifier: Apache-2.0
"""Giving memory back to the system.

glibc keeps freed memory for itself; after a block has left, `malloc_trim` hands it over. Without it the resident size
grows with the number of blocks although nothing refers to them any more. Reference cycles are left to Python: nothing
here makes any, and a full collection takes a third of a second once transformers is loaded.
"""

import ctypes
import sys

import torch


def release_memory() -> None:
    """Return freed host memory to the system (Linux), and cached device memory to the device."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # musl has no malloc_trim and needs none
            return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
