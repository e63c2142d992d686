# SPDX-License-Identifier: Apache-2.0
"""Laws of every backend: it computes what the reference computes, differentiably, and gives back every bit it repacked."""

import copy
from itertools import islice
from statistics import median

import pytest
import torch
from safetensors.torch import load_file
from tiny import tokens
from transformers import AutoModelForCausalLM, CompileConfig

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.backends import ALIASES, BACKENDS
from hf_autoround.backends.base import missing
from hf_autoround.backends.int4_order import measured_order
from hf_autoround.backends.select import assign_backends, candidates, select_backend
from hf_autoround.backends.torch_reference import TorchReference
from hf_autoround.errors import MissingDependency, UnknownName, UnsupportedLayer
from hf_autoround.layers.packed_linear import PackedLinear, dequantize_and_multiply
from hf_autoround.layouts import LAYOUTS, PackQuantized
from hf_autoround.numerics import data_type
from hf_autoround.numerics.grouping import group
from hf_autoround.scheme import integer_scheme

CPU = torch.device("cpu")
DEVICES = [CPU] + ([torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else [])
SHAPES = [(64, 256), (144, 512), (48, 96), (7, 33), (16, 100)]  # out, in: whole blocks, a rest, odd ones
SIZES = (-1, 32, 128, 512)
ROWS = (1, 3, 50)  # below and above every switch to dequantizing
LAYERS = [
    (layout, integer_scheme(bits, size, sym), shape)
    for layout in LAYOUTS
    for bits in range(2, 9)
    for sym in (True, False)
    for size in SIZES
    for shape in SHAPES
    if layout.refuse(integer_scheme(bits, size, sym).weight, shape) is None
]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def packed_layer(layout, scheme, shape, dtype=torch.bfloat16, bias=True):
    """A random layer on the CPU, rounded to nearest."""
    spec, generator = scheme.weight, torch.Generator().manual_seed(sum(shape) + scheme.weight.bits)
    groups = group(torch.randn(shape, generator=generator) * 0.05, spec.granularity)
    numbers = data_type(spec)
    tensor = numbers.freeze(numbers.quantize(groups, spec, numbers.neutral(groups, spec)), spec)
    layer = PackedLinear(shape, scheme, layout, bias=bias, dtype=dtype)
    for name, value in layout.pack(tensor, spec, shape[1]).items():
        layer.get_parameter(name).data = value
    if bias:
        layer.bias.data = torch.randn(shape[0], generator=generator).to(dtype)
    return layer


def taken(backend, dtype=torch.bfloat16, layers=LAYERS):
    """Yield what a backend takes on this machine: (layer in its order, the same layer as it was)."""
    if missing(backend):
        pytest.skip(missing(backend))
    found = False
    for description in layers:
        layer = packed_layer(*description, dtype=dtype)
        for device in DEVICES:
            moved = copy.deepcopy(layer).to(device)
            if backend.refuse(moved, device) is None:
                found = True
                reference = copy.deepcopy(moved)
                backend.prepare(moved)
                moved.kernel = backend.forward
                yield moved, reference
    if not found:
        pytest.skip("it takes no layer on this machine")


def few(layers=LAYERS):
    return [layer for layer in layers if layer[2] in SHAPES[:2] and layer[1].weight.group_size in (-1, 128)]


def distance(value, exact):
    return ((value.float() - exact.float()).norm() / exact.float().norm()).item()


@each_backend
def test_it_computes_what_the_reference_computes(backend):
    for layer, reference in taken(backend):
        weight, bias = reference.dequantized(), reference.bias.float()
        for rows in ROWS:
            inputs = torch.randn(rows, layer.in_features, device=layer.device)
            for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 8e-3), (torch.float32, 1e-5)):
                tolerance = 2e-2 if backend.may_round_inputs else tolerance  # 8 bits of inputs: float32 models have a test below
                outputs = layer(inputs.to(dtype))
                assert outputs.dtype == dtype
                expected = inputs.to(dtype).float() @ weight.t() + bias
                assert distance(outputs, expected) < tolerance, (layer, rows, dtype)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_float32_model_is_computed_in_float32_also_after_a_cast(backend, dtype):
    for layer, reference in taken(backend, dtype, few()):
        layer, inputs = layer.float(), torch.randn(5, layer.in_features, device=layer.device)
        exact = inputs @ reference.dequantized().float().t() + reference.bias.float()
        assert distance(layer(inputs), exact) < 1e-5


class Rounding(TorchReference):
    """The reference, as if it rounded inputs."""

    name, may_round_inputs = "rounding", True


def test_what_may_round_inputs_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("hf_autoround.backends.select.BACKENDS", (Rounding(), *BACKENDS))
    layer, precise = (
        packed_layer(LAYOUTS[0], integer_scheme(4, 64), (64, 256), dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert select_backend(layer, "it").name == "cpu_int4" and select_backend(layer, "it", "rounding").name == "rounding"
    assert select_backend(precise, "it").name == "rounding"


@each_backend
def test_a_layer_keeps_every_bit_of_its_layout(backend):
    for layer, reference in taken(backend):
        saved, original = layer.state_dict(), reference.state_dict()
        assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)
        assert {name: tensor.dtype for name, tensor in saved.items()} == {name: original[name].dtype for name in saved}
        assert torch.equal(layer.dequantized(), reference.dequantized())
        assert all(torch.equal(layer.packed()[name], tensor) for name, tensor in reference.packed().items())


@each_backend
def test_inputs_get_their_gradient(backend):
    for layer, reference in taken(backend, layers=few()):
        for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float32, 1e-5)):
            inputs = torch.randn(2, 3, layer.in_features, device=layer.device).to(dtype).requires_grad_()
            direction = torch.randn(2, 3, layer.out_features, device=layer.device).to(dtype)
            layer(inputs).backward(direction)
            exact = direction.float() @ reference.dequantized()
            assert inputs.grad.dtype == dtype and distance(inputs.grad, exact) < tolerance


@each_backend
def test_it_follows_autocast_and_takes_any_strides(backend):
    for layer, reference in islice(taken(backend, layers=few()), 4):
        inputs = torch.randn(layer.in_features, 4, 3, device=layer.device).permute(2, 1, 0)
        with torch.autocast(layer.device.type, torch.bfloat16):
            outputs = layer(inputs)
        assert outputs.dtype == torch.bfloat16 and outputs.shape == (3, 4, layer.out_features)
        assert distance(outputs, dequantize_and_multiply(reference.float(), inputs)) < 8e-3
        assert layer(inputs[:0]).shape == (0, 4, layer.out_features)


@each_backend
def test_a_layer_is_copied_cast_and_loaded_into(backend):
    for layer, reference in islice(taken(backend, layers=few()), 6):
        inputs = torch.randn(2, layer.in_features, device=layer.device).to(torch.bfloat16)
        outputs = layer(inputs)
        assert torch.equal(copy.deepcopy(layer)(inputs), outputs)
        cast = copy.deepcopy(layer).to(torch.float16)
        assert all(torch.equal(cast.packed()[name], tensor) for name, tensor in reference.packed().items())
        other = copy.deepcopy(layer)
        negated = reference.state_dict() | {"scales": -reference.scales, "bias": -reference.bias}
        other.load_state_dict(negated)
        assert torch.equal(other(inputs), -outputs)
        elsewhere = copy.deepcopy(layer).to("meta")
        assert {name: tensor.device.type for name, tensor in elsewhere.packed().items()} == dict.fromkeys(
            layer.packed_names, "meta"
        )


@each_backend
def test_a_refusal_is_the_end_of_a_sentence(backend):
    layers = [packed_layer(*description, dtype=dtype) for description in LAYERS[::7] for dtype in (torch.float32, torch.bfloat16)]
    reasons = [backend.refuse(layer, device) for layer in layers for device in (CPU, torch.device("cuda"), torch.device("meta"))]
    said = {reason for reason in reasons if reason is not None}
    assert all(" " in reason and not reason.endswith(".") for reason in said)
    assert bool(said) == (backend.name != "torch")


EVERY_REASON = {
    "cpu_int4": (3, ["a CPU, not on cuda", "cannot read the layout", "in float32", "16 outputs", "groups of a multiple of 32"]),
    "cpu_int8": (3, ["a CPU, not on cuda", "8 bits, not", "layout", "in float32", "one scale for each output", "16 inputs"]),
    "ark": (5, ["a CPU, not on cuda", "2, 3, 4 or 8 bits", "cannot read the layout", "whole groups"]),
    "triton": (3, ["not on meta", "cannot read the layout", "32 inputs, not 72", "32 inputs, not of 20"]),
    "gptqmodel:marlin": (5, ["not on meta", "gptq and gptq_v2, not pack_quantized", "5-bit codes in another order"]),
    "gptqmodel:awq_torch": (5, ["in memory, and these are offloaded", "awq, not pack_quantized", "in another order"]),
}


@pytest.mark.parametrize("name", EVERY_REASON)
def test_a_refusal_gives_every_reason(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    bits, reasons = EVERY_REASON[name]
    layer = packed_layer(PackQuantized(), integer_scheme(bits, 20), (7, 72), torch.float32)
    device = torch.device("cuda" if "cuda" in reasons[0] else "meta")
    said = next(backend for backend in BACKENDS if backend.name == name).refuse(layer, device).split(", and it ")
    assert len(said) == len(reasons) and all(reason in part for reason, part in zip(reasons, said, strict=True)), said


@pytest.mark.parametrize("rows", [16, 48, 64, 80, 560, 1088])
def test_int4_codes_lie_as_torch_packs_them(rows):
    codes = torch.randint(0, 16, (rows, 96), dtype=torch.uint8)
    order = measured_order(rows)
    packed = order.pack(codes)
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
    assert torch.equal(order.unpack(packed), codes)


def test_there_is_a_backend_for_every_layer():
    for description in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            assert select_backend(packed_layer(*description, dtype=dtype), "layer")
    offloaded = packed_layer(*LAYERS[0]).to("meta")
    assert select_backend(offloaded, "layer").name == "torch"


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_stands_for_backends_that_there_are(alias):
    names = {backend.name for backend in BACKENDS}
    assert set(ALIASES[alias]) <= names and alias not in names
    if all(missing(backend) for backend in BACKENDS if backend.name in ALIASES[alias]):
        with pytest.raises(MissingDependency, match=r"pip install \S+"):
            candidates(alias)
    else:
        assert {backend.name for backend in candidates(alias)} == set(ALIASES[alias])


@pytest.mark.parametrize(
    ("scheme", "sym", "name"),
    [("W4A16", True, "cpu_int4"), ("W2A16", False, "cpu_int4"), ({"bits": 8, "group_size": -1}, True, "cpu_int8")],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt_oss", "gpt2"])
def test_a_model_is_loaded_generates_and_is_saved_as_it_was(architecture, scheme, sym, name, tiny_model, tmp_path):
    given = {"bits": scheme["bits"], "group_size": -1} if isinstance(scheme, dict) else {"scheme": scheme, "group_size": 32}
    source = tiny_model(architecture, torch.bfloat16)
    AutoRound(str(source), sym=sym, recipe="rtn", disable_tqdm=True, **given).quantize_and_save(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=AutoRoundConfig(backend="torch")
    )
    used = {module.kernel.__self__.name for module in model.modules() if isinstance(module, PackedLinear)}
    assert name in used
    assert model.hf_quantizer.is_compileable == (architecture in ("llama", "gpt2"))  # the others' experts break graphs
    rows = tokens()[:2]
    with torch.no_grad():
        logits, expected = model(rows).logits, reference(rows).logits
        # the median, for a router may send a token to other experts
        assert median([distance(*pair) for pair in zip(logits[0], expected[0], strict=True)]) < 0.02
        assert model.generate(rows[:1], max_new_tokens=4, do_sample=False).shape == (1, rows.shape[1] + 4)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(again(rows).logits, model(rows).logits)
    dense = model.dequantize()(rows).logits
    assert median([distance(*pair) for pair in zip(dense[0], expected[0], strict=True)]) < 0.02


def test_a_float32_model_stays_exact(tiny_model, tmp_path):
    AutoRound(str(tiny_model("llama")), scheme="W4A16", group_size=32, recipe="rtn", disable_tqdm=True).quantize_and_save(
        tmp_path
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 21 and {layer.kernel.__self__.name for layer in layers} <= {"torch", "ark", "triton"}
    logits, plain = model(tokens()[:2]).logits, model.dequantize()
    assert not [name for name, module in plain.named_modules() if isinstance(module, PackedLinear)]
    torch.testing.assert_close(logits, plain(tokens()[:2]).logits, rtol=0, atol=1e-4)


def test_a_backend_that_cannot_be_had_is_refused_before_anything_is_loaded(tiny_model, tmp_path, monkeypatch):
    AutoRound(str(tiny_model("llama")), scheme="W4A16", group_size=32, recipe="rtn", disable_tqdm=True).quantize_and_save(
        tmp_path
    )
    (tmp_path / "model.safetensors").unlink()  # whoever reads it fails otherwise

    def load(backend):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AutoRoundConfig(backend=backend))

    with pytest.raises(UnknownName, match="did you mean torch"):
        load("torhc")
    with pytest.raises(UnknownName, match="no backend is called None; there are auto, "):
        load(None)
    monkeypatch.setattr("hf_autoround.backends.base.find_spec", lambda module: None)
    with pytest.raises(MissingDependency, match="pip install auto-round-lib"):
        load("ark")
    with pytest.raises(MissingDependency, match="gptqmodel:marlin, gptqmodel:awq_marlin: it needs gptqmodel, which is"):
        load("marlin")


def test_a_backend_that_refuses_says_which_layer_and_why_and_nothing_is_changed():
    layers = torch.nn.Sequential(
        packed_layer(LAYOUTS[0], integer_scheme(8, -1), (64, 256), bias=False),
        packed_layer(LAYOUTS[0], integer_scheme(4, 32), (256, 64), bias=False),
    )
    before = layers.state_dict()
    with pytest.raises(UnsupportedLayer, match=r"'cpu_int8' cannot run 1 \(W4A16G32\): cpu_int8: it multiplies .* of 8 bits"):
        assign_backends(layers, "cpu_int8")
    assert all(module.repacked is None for module in layers) and layers.state_dict().keys() == before.keys()
    assign_backends(layers)
    assert [module.kernel.__self__.name for module in layers] == ["cpu_int8", "cpu_int4"]


class OnlyThere(TorchReference):
    """The reference, on one kind of device alone."""

    name, compiles = "only_there", False

    def refuse(self, layer, device):
        return None if device.type == "lazy" else f"it does not run on {device.type}"


@pytest.mark.parametrize("wanted", ["auto", "only_there", "cpu_int4", "torch"])
def test_a_layer_gets_the_backend_of_the_device_that_it_moves_to(wanted, other_device, monkeypatch):
    monkeypatch.setattr("hf_autoround.backends.select.BACKENDS", (OnlyThere(), *BACKENDS))
    layer = packed_layer(LAYOUTS[0], integer_scheme(4, 64), (64, 256))
    there = layer.to(other_device) if wanted == "only_there" else layer
    chooser = assign_backends(torch.nn.Sequential(there), wanted)
    before, names = chooser.compiles, {}
    for place in (CPU, other_device, CPU):
        moved = torch.nn.Sequential(there).to(place)[0]
        names[place] = moved.kernel.__self__.name
        inputs = torch.randn(3, 256).bfloat16()
        expected = dequantize_and_multiply(packed_layer(LAYOUTS[0], integer_scheme(4, 64), (64, 256)), inputs)
        assert distance(moved(inputs.to(place)).cpu(), expected) < 8e-3
    anywhere = dict.fromkeys(names, "torch")
    assert names == (anywhere if wanted == "torch" else {CPU: "cpu_int4", other_device: "only_there"})
    assert before == (wanted != "only_there") and chooser.compiles == (wanted == "torch")


def test_a_layer_that_was_given_no_backend_keeps_none_elsewhere():
    layer = packed_layer(LAYOUTS[0], integer_scheme(4, 64), (64, 256))
    layer.kernel = OnlyThere().forward
    assert layer.bfloat16().kernel != dequantize_and_multiply and layer.to("meta").kernel == dequantize_and_multiply


@pytest.mark.parametrize("name", ["cpu_int4", "cpu_int8", "torch"])
def test_it_compiles_into_one_graph(name):
    size = -1 if name == "cpu_int8" else 64
    layer = packed_layer(LAYOUTS[0], integer_scheme(8 if name == "cpu_int8" else 4, size), (144, 256))
    assign_backends(torch.nn.Sequential(layer), name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    for rows in ROWS:
        inputs = torch.randn(rows, 256).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(inputs), layer(inputs))
    inputs.requires_grad_()
    gradients = [torch.autograd.grad(function(inputs).float().sum(), inputs)[0] for function in (compiled, layer)]
    assert torch.equal(*gradients)


def test_a_compiled_model_generates_with_a_static_cache(tiny_model, tmp_path):
    source = tiny_model("llama", torch.bfloat16)
    AutoRound(str(source), scheme="W4A16", group_size=32, recipe="rtn", disable_tqdm=True).quantize_and_save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    eager = model.generate(tokens()[:1], **arguments)
    torch._dynamo.reset()
    how = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    how._compile_all_devices = True  # on a GPU transformers compiles unasked
    compiled = model.generate(tokens()[:1], cache_implementation="static", compile_config=how, **arguments)
    assert torch.equal(compiled, eager) and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_offloaded_layers_are_dequantized_and_the_others_run_by_kernels(tiny_model, tmp_path):
    source = tiny_model("llama", torch.bfloat16)
    AutoRound(str(source), scheme="W4A16", group_size=32, recipe="rtn", disable_tqdm=True).quantize_and_save(tmp_path / "out")
    parts = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
    places = {f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts} | {"lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    used = [
        {module.kernel.__self__.name for module in layer.modules() if isinstance(module, PackedLinear)}
        for layer in model.model.layers
    ]
    assert used == [{"cpu_int4"}, {"torch"}, {"cpu_int4"}]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert distance(model(tokens()[:2]).logits, whole(tokens()[:2]).logits) < 0.02
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
