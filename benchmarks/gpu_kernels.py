# SPDX-License-Identifier: Apache-2.0
"""Microseconds of a product with a packed weight on a GPU, beside a bfloat16 one, by rows of inputs.

    python benchmarks/gpu_kernels.py

Products run in CUDA graphs, so that launches cost nothing, over copies of the weight that do not fit the cache together.
Each result is compared with the product by the dequantized weight.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_autoround.backends.triton_kernels import gptq_matmul
from hf_autoround.layouts import GPTQ_V1
from hf_autoround.numerics import dequantize
from hf_autoround.numerics.grouping import ungroup
from hf_autoround.scheme import integer_scheme

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]  # inputs, outputs
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
GROUP = 128


def packed(shape: tuple[int, int], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random qweight, qzeros and scales in the GPTQ layout."""
    inner, columns = shape

    def words(*size: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, size, device="cuda", dtype=torch.int32)

    scales = (torch.rand(inner // GROUP, columns, device="cuda") / 2**bits / 8).half()
    return words(inner * bits // 32, columns), words(inner // GROUP, columns * bits // 32), scales


def distance(inputs: Tensor, output: Tensor, tensors: tuple[Tensor, Tensor, Tensor], bits: int) -> float:
    """Return how far an output is from the product with the dequantized weight, relative to its size."""
    spec = integer_scheme(bits, GROUP, sym=False).weight
    assert spec is not None
    shape = output.shape[1], inputs.shape[1]
    names = dict(zip(("qweight", "qzeros", "scales"), tensors, strict=True))
    expected = inputs.float() @ ungroup(dequantize(GPTQ_V1.unpack(names, spec, shape)), shape[1]).t()
    return ((output - expected).norm() / expected.norm()).item()


def product(inputs: Tensor, bits: int, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return x W^T by our kernels."""
    return gptq_matmul(inputs, *tensors, bits, GROUP, 1)


def microseconds(call: Callable[[Any], Tensor], weights: Sequence[Any]) -> float:
    """Return the time of a call with a weight, best of five."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        call(weights[0])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            for weight in weights:
                call(weight)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(weights))
    return min(times)


@torch.no_grad()
def main() -> None:
    print(torch.cuda.get_device_name(), f"{'K x N, by rows':<24}", *(f"{rows:>7}" for rows in ROWS))
    for shape in SHAPES:
        copies = max(24, 300_000_000 // (shape[0] * shape[1]))
        inputs = {rows: torch.randn(rows, shape[0], device="cuda", dtype=torch.bfloat16) for rows in ROWS}
        weights = [torch.randn(shape[::-1], device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        times = [microseconds(partial(torch.nn.functional.linear, x), weights) for x in inputs.values()]
        print(f"{'x'.join(map(str, shape)):>16} bfloat16", *(f"{time:>7.1f}" for time in times), flush=True)
        for bits in (4, 8, 2, 3):
            layers = [packed(shape, bits) for _ in range(copies)]
            for x in inputs.values():
                off = distance(x, product(x, bits, layers[0]), layers[0], bits)
                assert off < 0.01, f"{bits} bits, {len(x)} rows: {off}"
            times = [microseconds(partial(product, x, bits), layers) for x in inputs.values()]
            print(f"{'x'.join(map(str, shape)):>16} {bits} bits  ", *(f"{time:>7.1f}" for time in times), flush=True)


if __name__ == "__main__":
    main()
