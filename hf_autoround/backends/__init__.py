# SPDX-License-Identifier: Apache-2.0
"""Kernels for packed weights, in the order in which they are preferred.

To add a backend: write `backends/<name>.py` with a subclass of Backend (`name`, `refuse`, `forward`; `needs` a package,
`prepare` a layer where it must), and put it at its rank in BACKENDS. `backends/select.py` chooses.
"""

from collections.abc import Mapping

from hf_autoround.backends.ark import Ark
from hf_autoround.backends.base import Backend
from hf_autoround.backends.cpu_int4 import CPUInt4
from hf_autoround.backends.cpu_int8 import CPUInt8
from hf_autoround.backends.hpu import HPU
from hf_autoround.backends.torch_reference import TorchReference

BACKENDS: tuple[Backend, ...] = (
    # on a GPU
    HPU(),
    # on a CPU
    CPUInt8(),
    CPUInt4(),
    Ark(),
    # anywhere
    TorchReference(),
)

# other names that users know, for one or more of the above
ALIASES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu_int8", "cpu_int4"),
    "auto_round_kernel": ("ark",),
    "auto_round:torch": ("torch",),
}

__all__ = ["ALIASES", "BACKENDS", "Backend"]
