# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference: on a GPU if there is one, else in Triton's interpreter.

The interpreter has to be switched on before Triton is first imported, so `test_triton.py` runs this file in a process of
its own. By hand: `TRITON_INTERPRET=1 pytest tests/backends/triton_laws.py`.
"""

import copy

import pytest
import torch
from packed import packed_linear
from tiny import tokens
from transformers import AutoModelForCausalLM

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.backends.torch_reference import TorchReference
from hf_autoround.backends.triton_gptq import TritonGPTQ
from hf_autoround.layouts import AWQ, GPTQ_V1, GPTQ_V2

pytest.importorskip("triton")
from hf_autoround.backends import triton_kernels
from hf_autoround.backends.triton_kernels import TILED_ROWS, VECTOR_ROWS, gptq_dense

TRITON, REFERENCE = TritonGPTQ(), TorchReference()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative; two roundings of the output
KERNELS = (1, VECTOR_ROWS + 1, TILED_ROWS + 1)  # rows for which each is taken
ROWS = (*KERNELS, 2, 33)  # and more and less filled tiles


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bfloat16 matrices as integers (3.4 to 3.9): widen them first."""
    if DEVICE.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(handle.data.copy()).view(torch.bfloat16)
        return interpreter.TensorHandle(bits.float().numpy(), tl.float32)

    def create_dot(self, left, right, *rest):
        return plain(self, widened(left), widened(right), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def error(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    return ((outputs.double() - expected.double()).norm() / expected.double().norm()).item()


def rows_of(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [*((size, torch.float16) for size in (-1, 32, 64, 128)), (64, torch.float32), (64, torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_product_is_the_references(bits, sym, size, dtype):
    layer = packed_linear(bits, size, sym, (40, 256)).to(DEVICE)
    assert TRITON.refuse(layer, DEVICE) is None
    for count in KERNELS:
        inputs = rows_of(count, 256, dtype)
        outputs = TRITON.forward(layer, inputs)
        assert outputs.dtype == dtype
        assert error(outputs, REFERENCE.forward(layer, inputs)) < TOLERANCE[dtype], f"{count} rows"


@pytest.mark.parametrize("layout", [GPTQ_V1, GPTQ_V2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dense_weight_is_the_references_bit_for_bit(bits, layout):
    layer = packed_linear(bits, 64, False, (40, 160), layout).to(DEVICE)  # the last group has 32 columns
    for dtype in TOLERANCE:
        packed = layer.qweight, layer.qzeros, layer.scales
        dense = gptq_dense(*packed, 160, bits, 64, layout.zero_offset, dtype)
        expected = layer.dequantized(dtype)
        if dtype == torch.bfloat16 and DEVICE.type == "cpu":  # the interpreter rounds ties to bfloat16 in its own way
            torch.testing.assert_close(dense.t(), expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(dense.t(), expected)


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (130, 64), (64, 1120), (40, 160)], ids=str)
@pytest.mark.parametrize(("bits", "layout"), [(3, GPTQ_V1), (4, GPTQ_V2), (5, GPTQ_V1)], ids=["3-v1", "4-v2", "5-v1"])
def test_odd_shapes_are_masked(bits, shape, layout):
    layer = packed_linear(bits, 64, False, shape, layout).to(DEVICE)
    for count in ROWS:
        inputs = rows_of(count, shape[1], torch.float16)
        assert error(TRITON.forward(layer, inputs), REFERENCE.forward(layer, inputs)) < TOLERANCE[torch.float16]


def test_a_long_row_shared_among_programs_adds_up(monkeypatch):
    layer, inputs = packed_linear(4, 128, False, (64, 2080)).to(DEVICE), rows_of(16, 2080, torch.float16)
    split = TRITON.forward(layer, inputs)
    monkeypatch.setattr(triton_kernels, "product_launch", triton_kernels.product_launch.__wrapped__)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 1)
    assert triton_kernels.product_launch(16, 2080, 64, 4, 128).splits == 1
    whole = TRITON.forward(layer, inputs)
    expected = REFERENCE.forward(layer, inputs)
    assert error(split, expected) < TOLERANCE[torch.float16] and error(whole, expected) < TOLERANCE[torch.float16]


def test_a_layer_in_another_layout_is_put_in_order_and_saved_as_it_was():
    layer = packed_linear(4, 64, False, (40, 256), AWQ()).to(DEVICE)
    reference = copy.deepcopy(layer)
    assert TRITON.refuse(layer, DEVICE) is None
    TRITON.prepare(layer)
    layer.kernel = TRITON.forward
    assert "qweight" not in dict(layer.named_parameters())
    for count in ROWS:
        inputs = rows_of(count, 256, torch.float16)
        assert error(layer(inputs), reference(inputs)) < TOLERANCE[torch.float16]
    saved, before = layer.state_dict(), reference.state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in saved)


def test_inputs_keep_their_leading_dimensions_may_be_strided_and_follow_autocast():
    layer = packed_linear(4, 32, True, (24, 64)).to(DEVICE)
    inputs = rows_of(6, 128, torch.float32)[:, ::2].view(2, 3, 64)
    outputs = TRITON.forward(layer, inputs)
    assert outputs.shape == (2, 3, 24)
    expected = REFERENCE.forward(layer, inputs)
    assert error(outputs, expected) < 2e-6
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = TRITON.forward(layer, inputs)
    assert outputs.dtype == torch.bfloat16 and error(outputs, expected) < TOLERANCE[torch.bfloat16]
    assert TRITON.forward(layer, inputs[:0]).shape == (0, 3, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("count", ROWS)
def test_the_gradient_of_the_inputs_is_the_references(count, dtype):
    layer = packed_linear(3, 64, False, (72, 160)).to(DEVICE)
    gradients = []
    for backend in (TRITON, REFERENCE):
        inputs = rows_of(count, 160, dtype).requires_grad_()
        backend.forward(layer, inputs).float().square().sum().backward()
        gradients.append(inputs.grad)
    assert error(*gradients) < 2 * TOLERANCE[dtype]


def test_the_operators_keep_pytorchs_contract():
    layer = packed_linear(4, 32, False, (24, 64)).to(DEVICE)
    packed = layer.qweight.data, layer.qzeros.data, layer.scales.data
    inputs = rows_of(3, 64, torch.float32)
    torch.library.opcheck(torch.ops.hf_autoround.gptq_matmul.default, (inputs, *packed, 4, 32, 1))
    torch.library.opcheck(torch.ops.hf_autoround.gptq_dense.default, (*packed, 64, 4, 32, 1, torch.float16))


@pytest.mark.parametrize("count", [1, TILED_ROWS + 1])
def test_a_layer_compiles_into_one_graph_with_its_gradient(count):
    layer = packed_linear(4, 32, True, (24, 64)).to(DEVICE)
    layer.kernel = TRITON.forward
    compiled = torch.compile(copy.copy(layer), fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (compiled, layer):
        inputs = rows_of(count, 64, torch.float32).requires_grad_()
        module(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    assert error(*gradients) < 2e-6


def test_a_model_generates_compiled_with_a_static_cache(tiny_model, tmp_path):
    AutoRound(str(tiny_model("llama")), scheme="W4A16", group_size=32, recipe="rtn", disable_tqdm=True).quantize_and_save(
        tmp_path
    )
    texts = {}
    for backend in ("torch", "triton"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, device_map=DEVICE, quantization_config=AutoRoundConfig(backend=backend)
        )
        assert model.model.layers[0].mlp.up_proj.kernel.__self__.name == backend
        if backend == "triton":
            model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        rows = tokens(1, 6).to(DEVICE)
        texts[backend] = model.generate(
            rows, max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True
        )
    assert texts["triton"].shape == (1, 8) and torch.equal(texts["torch"], texts["triton"])
