# SPDX-License-Identifier: Apache-2.0
"""GPTQModel's kernels behind our layers: refusals everywhere, its PyTorch kernels on a CPU, the others on a GPU."""

import pytest
import torch
from packed import packed_linear

from hf_autoround.backends import BACKENDS
from hf_autoround.backends.base import missing
from hf_autoround.backends.gptqmodel import AWQ_TORCH, TORCH, GPTQModel
from hf_autoround.layouts import AWQ, GPTQ_V1, GPTQ_V2

ALL = [backend for backend in BACKENDS if isinstance(backend, GPTQModel)]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
CELLS = [  # few: GPTQModel compiles each for seconds
    (TORCH, GPTQ_V1, 3, 64, False),
    (TORCH, GPTQ_V1, 8, -1, True),
    (TORCH, GPTQ_V2, 4, 128, False),
    (AWQ_TORCH, AWQ(), 4, 32, True),
    (AWQ_TORCH, AWQ(), 4, 128, False),
]


def prepared(backend, layout, bits, size, sym, dtype=torch.bfloat16):
    layer = packed_linear(bits, size, sym, (96, 256), layout, dtype)
    assert backend.refuse(layer, CPU) is None
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    backend.prepare(layer)
    layer.kernel = backend.forward
    return layer, before


@pytest.mark.parametrize(("backend", "layout", "bits", "size", "sym"), CELLS, ids=lambda part: str(getattr(part, "name", part)))
def test_a_product_and_its_gradient_are_the_references(backend, layout, bits, size, sym):
    pytest.importorskip("gptqmodel")
    layer, _ = prepared(backend, layout, bits, size, sym)
    weight = packed_linear(bits, size, sym, (96, 256), layout).dequantized()
    inputs = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    outputs = layer(inputs)
    outputs.float().square().sum().backward()
    expected = inputs.detach().float() @ weight.t() + layer.bias.float()
    assert outputs.dtype == torch.bfloat16 and (outputs - expected).norm() < 1e-2 * expected.norm()
    gradient = 2 * expected @ weight
    assert (inputs.grad - gradient).norm() < 1.5e-2 * gradient.norm()


@pytest.mark.parametrize("backend", [TORCH, AWQ_TORCH], ids=lambda backend: backend.name)
def test_what_is_saved_is_what_was_loaded(backend):
    pytest.importorskip("gptqmodel")
    layout = GPTQ_V1 if backend is TORCH else AWQ()
    layer, before = prepared(backend, layout, 4, 32, False)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    layer.restore()
    assert torch.equal(layer.qweight, before["qweight"])


@pytest.mark.parametrize("backend", ALL, ids=lambda backend: backend.name)
def test_a_refusal_says_why(backend, monkeypatch):
    own, other = (AWQ(), GPTQ_V1) if "awq" in backend.layouts else (GPTQ_V1, AWQ())
    layer = packed_linear(4, 32, True, (64, 128), own)
    if backend.device is not None:
        assert backend.refuse(layer, CPU) == "it runs on cuda, not on cpu"
    assert backend.refuse(packed_linear(4, 32, True, (64, 128), other), GPU) == (
        f"it reads the layouts {' and '.join(backend.layouts)}, not {other.name}"
    )
    five = backend.refuse(packed_linear(5, 72, True, (7, 72), GPTQ_V1), torch.device("meta"))
    assert "meta" in five or "offloaded" in five
    assert "in another order" in five and ("whole words, not 72 and 7" in five) and ("not gptq" in five) == (own is not GPTQ_V1)
    monkeypatch.setattr("hf_autoround.backends.base.find_spec", lambda name: None)
    assert missing(backend).endswith("not installed: pip install gptqmodel")


def test_gptqmodels_own_reasons_are_passed_on():
    pytest.importorskip("gptqmodel")
    reason = TORCH.refuse(packed_linear(4, 48, True, (64, 96), dtype=torch.bfloat16), CPU)
    assert reason.startswith("it is refused by gptqmodel: TorchLinear only supports") and "48" in reason
    assert "float32" in TORCH.refuse(packed_linear(4, 32, True, (64, 96)), CPU)
    assert "another order" in TORCH.refuse(packed_linear(5, 32, True, (64, 96), dtype=torch.bfloat16), CPU)


@pytest.mark.parametrize("backend", [backend for backend in ALL if backend.device == "cuda"], ids=lambda backend: backend.name)
def test_a_kernel_for_gpus_computes_what_the_reference_does(backend):
    pytest.importorskip("gptqmodel")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    layer = packed_linear(4, 128, True, (256, 512), AWQ() if "awq" in backend.layouts else GPTQ_V1, torch.float16).to(GPU)
    reason = backend.refuse(layer, layer.device)
    if reason is not None:
        pytest.skip(reason)
    inputs = torch.randn(9, 512, device=GPU, dtype=torch.float16)
    expected = torch.nn.functional.linear(inputs.float(), layer.dequantized(), layer.bias.float())
    backend.prepare(layer)
    assert (backend.forward(layer, inputs) - expected).norm() < 5e-3 * expected.norm()
