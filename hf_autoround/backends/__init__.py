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
from hf_autoround.backends.gptqmodel import AWQ_EXLLAMA_V2, AWQ_GEMM, AWQ_MARLIN, AWQ_TORCH, EXLLAMA_V2, MARLIN, TORCH
from hf_autoround.backends.hpu import HPU
from hf_autoround.backends.torch_reference import TorchReference
from hf_autoround.backends.triton_gptq import TritonGPTQ

BACKENDS: tuple[Backend, ...] = (
    # on a GPU
    MARLIN,
    AWQ_MARLIN,
    TritonGPTQ(),
    EXLLAMA_V2,
    AWQ_EXLLAMA_V2,
    AWQ_GEMM,
    HPU(),
    # on a CPU
    CPUInt8(),
    CPUInt4(),
    Ark(),
    # anywhere
    TorchReference(),
    TORCH,
    AWQ_TORCH,
)

# other names that users know, for one or more of the above
ALIASES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu_int8", "cpu_int4"),
    "auto_round_kernel": ("ark",),
    "auto_round:torch": ("torch",),
    "auto_round:tritonv2": ("triton",),
    "marlin": ("gptqmodel:marlin", "gptqmodel:awq_marlin"),
    "exllamav2": ("gptqmodel:exllamav2", "gptqmodel:awq_exllamav2"),
    "awq": ("gptqmodel:awq_marlin", "gptqmodel:awq_exllamav2", "gptqmodel:awq_gemm"),
    "gptqmodel": tuple(f"gptqmodel:{name}" for name in ("marlin", "awq_marlin", "exllamav2", "awq_exllamav2", "awq_gemm")),
}

__all__ = ["ALIASES", "BACKENDS", "Backend"]
