# SPDX-License-Identifier: Apache-2.0
"""Packed layers with random weights, for tests of backends."""

import torch

from hf_autoround.backends.torch_reference import TorchReference
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.layouts import GPTQ_V1, Layout
from hf_autoround.numerics import data_type
from hf_autoround.numerics.grouping import group
from hf_autoround.scheme import integer_scheme


def packed_linear(
    bits: int, size: int, sym: bool, shape: tuple[int, int], layout: Layout = GPTQ_V1, dtype: torch.dtype = torch.float32
) -> PackedLinear:
    """A layer (O, I) with a bias in `dtype`, its random weights rounded to nearest; run by the reference."""
    generator = torch.Generator().manual_seed(bits)
    scheme = integer_scheme(bits, size, sym)
    numbers = data_type(scheme.weight)
    groups = group(torch.randn(shape, generator=generator) * 0.1, scheme.weight.granularity)
    tensor = numbers.freeze(numbers.quantize(groups, scheme.weight, numbers.neutral(groups, scheme.weight)), scheme.weight)
    layer = PackedLinear(shape, scheme, layout, TorchReference().forward, bias=True, dtype=dtype)
    layer.load_state_dict(layout.pack(tensor, scheme.weight, shape[1]) | {"bias": torch.randn(shape[0], generator=generator)})
    return layer
