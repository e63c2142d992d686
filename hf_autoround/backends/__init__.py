# SPDX-License-Identifier: Apache-2.0
"""Kernels for packed weights, in the order in which they are preferred.

To add a backend: write `backends/<name>.py` with `name`, `refuse` and `forward`, and put it at its rank in BACKENDS.
"""

import torch

from hf_autoround.backends.base import Backend
from hf_autoround.backends.gptqmodel import AWQ_EXLLAMA_V2, AWQ_GEMM, AWQ_MARLIN, AWQ_TORCH, EXLLAMA_V2, MARLIN, TORCH
from hf_autoround.backends.hpu import HPU
from hf_autoround.backends.torch_reference import TorchReference
from hf_autoround.backends.triton_gptq import TritonGPTQ
from hf_autoround.errors import UnsupportedLayer
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.registry import find

BACKENDS: tuple[Backend, ...] = (
    MARLIN,
    AWQ_MARLIN,
    TritonGPTQ(),
    EXLLAMA_V2,
    AWQ_EXLLAMA_V2,
    AWQ_GEMM,
    HPU(),
    TorchReference(),
    TORCH,
    AWQ_TORCH,
)


def select_backend(layer: PackedLinear, name: str, device: torch.device, wanted: str = "auto") -> Backend:
    """Return the first backend that takes a layer, or the wanted one.

    Raises UnsupportedLayer with every reason, UnknownName for a backend that does not exist.
    """
    candidates = BACKENDS if wanted == "auto" else (find(BACKENDS, wanted, kind="backend"),)
    reasons = []
    for backend in candidates:
        reason = backend.refuse(layer, device)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise UnsupportedLayer(f"no backend takes {name}: {'; '.join(reasons)}")


__all__ = ["BACKENDS", "Backend", "select_backend"]
