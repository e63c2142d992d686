# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: what it refuses, that its kernels are right, and that they compile for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import packed_linear

from hf_autoround.backends.base import missing
from hf_autoround.backends.triton_gptq import TritonGPTQ
from hf_autoround.layouts import AWQ, GPTQ_V1, PackQuantized

GPU = torch.device("cuda")  # named, not used: a refusal runs nothing


def test_kernels_obey_their_laws():
    pytest.importorskip("triton")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__).with_name("triton_laws.py"))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile_for_a_gpu_and_fit_it(capability):
    """What the interpreter does not see: types, constants, shared memory. Triton compiles without a GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_autoround.backends import triton_kernels as kernels

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is set to interpret, not to compile")
    shared_memory = 99 * 1024  # of one program, where it is smallest: compute capability 8.6, 8.9 and 12.0
    types = {"inputs": "*bf16", "weight": "*bf16", "outputs": "*fp32", "scales": "*fp16", "qweight": "*i32", "qzeros": "*i32"}
    for bits, columns in ((3, 256), (4, 256), (3, 1)):
        products = [kernels.product_launch(rows, 256, columns, bits, 128) for rows in (1, 64)]
        for kernel, _, sizes, _ in (*products, kernels.dense_launch(256, columns)):
            names = kernel.arg_names
            given = sizes | dict(bits=bits, group=128, zero_offset=1)
            constants = {parameter.name: given[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
            if columns == 1:  # of which Triton makes a constant
                constants["columns"] = 1
            signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
            source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
            options = {name: value for name, value in sizes.items() if name not in names}
            binary = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            assert binary.metadata.shared <= shared_memory


@pytest.mark.parametrize(
    ("layer", "device", "reason"),
    [
        (packed_linear(4, 32, True, (8, 64)), torch.device("cpu"), "it runs on CUDA and ROCm devices, not on cpu"),
        (packed_linear(4, 32, True, (8, 64), AWQ()), GPU, None),
        (packed_linear(4, 32, True, (8, 64), PackQuantized()), GPU, "it cannot read the layout pack_quantized"),
        (packed_linear(4, -1, True, (8, 72)), GPU, "it needs a multiple of 32 inputs, not 72"),
        (packed_linear(4, 48, True, (8, 96)), GPU, "it needs groups of a multiple of 32 inputs, not of 48"),
        (packed_linear(3, 64, False, (7, 96), GPTQ_V1), GPU, None),
    ],
    ids=["device", "awq", "layout", "inputs", "group", "fits"],
)
def test_a_refusal_says_why(layer, device, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert TritonGPTQ().refuse(layer, device) == reason


@pytest.mark.parametrize(
    ("capability", "dtype", "old"),
    [((7, 5), torch.bfloat16, True), ((7, 5), torch.float16, False), ((8, 0), torch.bfloat16, False)],
    ids=str,
)
def test_a_gpu_without_bfloat16_is_given_no_model_in_it(capability, dtype, old, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = TritonGPTQ().refuse(packed_linear(4, 32, True, (8, 64), dtype=dtype), GPU)
    assert (reason is not None and "too old for bfloat16" in reason) == old and (old or reason is None)


def test_without_triton_the_package_is_named(monkeypatch):
    monkeypatch.setattr("hf_autoround.backends.base.find_spec", lambda name: None)
    assert missing(TritonGPTQ()) == "it needs triton, which is not installed: pip install triton"
