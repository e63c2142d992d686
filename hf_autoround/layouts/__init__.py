# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors to named byte tensors and back: bit order, and nothing else.

To add a layout: write `layouts/<name>.py` with a subclass of `layouts.base.Layout` (`name`, `data_types`, `refuse`, `empty`,
`pack`, `unpack`), and add it to LAYOUTS. The law tests take it from there.
"""

from hf_autoround.layouts.awq import AWQ
from hf_autoround.layouts.base import IntegerLayout, Layout
from hf_autoround.layouts.float8 import Float8Stored
from hf_autoround.layouts.gptq import GPTQ
from hf_autoround.layouts.gptq_indexed import IndexedGPTQ
from hf_autoround.layouts.int_quantized import IntQuantized
from hf_autoround.layouts.microscaled import Microscaled
from hf_autoround.layouts.mlx import MLX
from hf_autoround.layouts.nvfp4 import NVFP4Packed
from hf_autoround.layouts.pack_quantized import PackQuantized

GPTQ_V1 = GPTQ("gptq", zero_offset=1)
GPTQ_V2 = GPTQ("gptq_v2", zero_offset=0)

# 8-bit floats as auto-round and DeepSeek write them, and as compressed-tensors does
FLOAT8 = Float8Stored("float8", block_scale="weight_scale_inv", upright=False)
FLOAT8_UPRIGHT = Float8Stored("float8_upright", block_scale="weight_scale", upright=True)

# where a data type has several, auto_round's own comes first
LAYOUTS: tuple[Layout, ...] = (
    GPTQ_V1,
    GPTQ_V2,
    AWQ(),
    PackQuantized(),
    IntQuantized(),
    MLX(),
    Microscaled(),
    NVFP4Packed(),
    FLOAT8,
    FLOAT8_UPRIGHT,
)

__all__ = [
    "AWQ",
    "FLOAT8",
    "FLOAT8_UPRIGHT",
    "GPTQ",
    "GPTQ_V1",
    "GPTQ_V2",
    "LAYOUTS",
    "MLX",
    "Float8Stored",
    "IndexedGPTQ",
    "IntQuantized",
    "IntegerLayout",
    "Layout",
    "Microscaled",
    "NVFP4Packed",
    "PackQuantized",
]
