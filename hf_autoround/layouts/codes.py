# SPDX-License-Identifier: Apache-2.0
"""Between a QuantizedTensor of integers and what integer layouts store: unsigned codes, zero points, float16 scales.

A symmetric grid is stored with the zero point 2^(b-1), as every integer kernel expects.

Shapes: O out features, I in features, G groups, S group size.
"""

import torch
from torch import Tensor

from hf_autoround.numerics import QuantizedTensor
from hf_autoround.numerics.grouping import group, ungroup
from hf_autoround.scheme import TensorSpec


def to_unsigned(tensor: QuantizedTensor, spec: TensorSpec, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (O, I) uint8, zero points (O, G) uint8, scales (O, G) float16."""
    assert isinstance(tensor.scale, Tensor)
    scales = tensor.scale.squeeze(-1)
    codes = ungroup(tensor.elements, columns)
    if tensor.zero_point is not None:
        return codes, tensor.zero_point.squeeze(-1), scales
    half = 2 ** (spec.bits - 1)
    zeros = torch.full(scales.shape, half, dtype=torch.uint8, device=scales.device)
    return codes.view(torch.uint8) + half, zeros, scales  # modulo 256: one pass


def from_unsigned(codes: Tensor, zeros: Tensor, scales: Tensor, spec: TensorSpec) -> QuantizedTensor:
    """Undo `to_unsigned`; a symmetric tensor whose zero points are all 2^(b-1) comes back without any."""
    grouped, scale = group(codes, spec.granularity), scales.unsqueeze(-1)
    if not spec.symmetric:
        return QuantizedTensor(grouped, scale, zeros.unsqueeze(-1).contiguous())
    signed = (grouped.to(torch.int16) - zeros.unsqueeze(-1).to(torch.int16)).to(torch.int8)
    padding = -codes.shape[-1] % grouped.shape[-1]
    if padding:
        signed[..., -1, -padding:] = 0
    return QuantizedTensor(signed, scale)
