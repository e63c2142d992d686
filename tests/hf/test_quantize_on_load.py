# SPDX-License-Identifier: Apache-2.0
"""Quantizing a float checkpoint inside from_pretrained: the same tensors as a run of the trainer on its files."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import CONFIGS, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, pipeline

from hf_autoround import AutoRound, AutoRoundConfig
from hf_autoround.errors import AutoRoundError, CheckpointError, UnknownName, UnsupportedLayer
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.tuning.rtn import nearest

SCHEMES = [
    {"scheme": "W4A16", "group_size": 32},
    {"scheme": "W2A16G32", "sym": False},
    {"scheme": "W3A16G32"},
    {"scheme": "W8A16", "group_size": -1},
    {"scheme": "W5A16G32", "sym": False},
    {"scheme": "W4A16G32", "layer_config": {"k_proj": {"bits": 8}, r"layers\.1\.mlp": "W2A16G32"}, "ignore_layers": ["o_proj"]},
    {"scheme": "W4A16G32", "quant_lm_head": True},
    {"scheme": "INT8"},
    {"scheme": "MXFP4"},
    {"scheme": "MXFP8", "layer_config": {"k_proj": "W4A16G32", "o_proj": "FPW8A16"}},
    {"scheme": "FP8_BLOCK"},
    {"scheme": "FP8_STATIC", "dataset": tokens(), "disable_opt_rtn": True},
    {"scheme": "NVFP4", "dataset": tokens(), "disable_opt_rtn": True},
]


def load(folder, **arguments):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    return model


def offline(model, folder, recipe="rtn", **arguments):
    AutoRound(str(model), recipe=recipe, disable_tqdm=True, **arguments).quantize_and_save(folder)
    return load_file(folder / "model.safetensors")


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_equals_the_offline_run(name, tiny_model, tmp_path):
    folder = tiny_model(name)
    model = load(folder, quantization_config=AutoRoundConfig(scheme="W4A16", group_size=32))
    assert_equal(saved(model, tmp_path / "ours"), offline(folder, tmp_path / "theirs", scheme="W4A16", group_size=32))
    rows = tokens()[:2]
    assert torch.equal(load(tmp_path / "ours")(rows).logits, model(rows).logits)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: "-".join(str(scheme[key]) for key in scheme if key != "dataset"))
def test_every_scheme_equals_the_offline_run(scheme, tiny_model, tmp_path):
    folder = tiny_model("llama", torch.bfloat16)
    model = load(folder, quantization_config=AutoRoundConfig(**scheme))
    assert_equal(saved(model, tmp_path / "ours"), offline(folder, tmp_path / "theirs", **scheme))
    config = model.config.quantization_config.to_dict()
    assert not {"scheme", "iters", "layer_config", "backend", "dataset"} & config.keys()


@pytest.mark.parametrize("how", ["dict", "transformers' own class", "our class"])
def test_every_spelling_of_the_configuration_means_round_to_nearest(how, tiny_model, tmp_path):
    config = {
        "dict": {"quant_method": "auto-round", "scheme": "W4A16", "group_size": 32},
        "transformers' own class": transformers.AutoRoundConfig(bits=4, group_size=32),
        "our class": AutoRoundConfig(bits=4, group_size=32),
    }[how]
    folder = tiny_model("qwen3")
    model = load(folder, quantization_config=config)
    assert_equal(saved(model, tmp_path / "ours"), offline(folder, tmp_path / "theirs", scheme="W4A16", group_size=32))


def test_a_pipeline_quantizes_on_load(tiny_model):
    config = AutoRoundConfig(scheme="W4A16", group_size=32)
    generator = pipeline("text-generation", model=str(tiny_model("llama")), model_kwargs={"quantization_config": config})
    assert sum(isinstance(module, PackedLinear) for module in generator.model.modules()) == 21
    assert generator("w5 w6 w7", max_new_tokens=3)[0]["generated_text"].startswith("w5 w6 w7")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("default", {"iters": 4, "nsamples": 8, "seqlen": 24}),
        ("opt-rtn", {"iters": 0, "nsamples": 8, "seqlen": 24}),
        ("e2e", {"iters": 0, "end_to_end_steps": 3, "self_samples": 8, "nsamples": 8, "seqlen": 24}),
    ],
    ids=["tuned", "searched", "end to end"],
)
def test_with_data_it_equals_the_offline_run(name, recipe, arguments, tiny_model, tmp_path):
    folder = tiny_model(name)
    shared = {"scheme": "W2A16G32", "seed": 7, "dataset": list(tokens(8))} | arguments
    model = load(folder, quantization_config=AutoRoundConfig(**shared))
    assert_equal(saved(model, tmp_path / "ours"), offline(folder, tmp_path / "theirs", recipe, **shared))
    rows = tokens()[:2]
    assert torch.equal(load(tmp_path / "ours")(rows).logits, model(rows).logits)


def test_texts_are_read_with_the_tokenizer_that_is_named(tiny_model, tmp_path):
    folder, texts = tmp_path / "bare", [" ".join(f"w{token}" for token in row) for row in tokens(8)]
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(folder)
    shared = {"scheme": "W2A16G32", "dataset": texts, "nsamples": 8, "seqlen": 24}
    with pytest.raises(AutoRoundError, match="need a tokenizer"):
        load(folder, quantization_config=AutoRoundConfig(**shared))
    with pytest.raises(CheckpointError, match=r"the tokenizer \S+nothing cannot be loaded"):
        load(folder, quantization_config=AutoRoundConfig(**shared, tokenizer=str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match=r"the tokenizer \S+nothing cannot be loaded"):
        offline(folder, tmp_path / "theirs", "opt-rtn", tokenizer=tmp_path / "nothing", **shared)
    model = load(folder, quantization_config=AutoRoundConfig(**shared, tokenizer=str(tiny_model("llama"))))
    theirs = offline(folder, tmp_path / "theirs", "opt-rtn", tokenizer=str(tiny_model("llama")), **shared)
    assert_equal(saved(model, tmp_path / "ours"), theirs)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_of_fused_experts_one_at_a_time_is_rounded(name, tiny_model, monkeypatch):
    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes[-1] = max(sizes[-1], result.numel())
            return result

    def watched(weight):
        shapes.append(tuple(weight.parameter.shape))
        sizes.append(0)
        with Largest():
            return nearest(weight)

    shapes, sizes = [], []
    monkeypatch.setattr("hf_autoround.hf.on_load.nearest", watched)
    model = load(tiny_model(name, torch.bfloat16), quantization_config=AutoRoundConfig(scheme="W4A16G32"))
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert sorted(shapes) == sorted((layer.out_features, layer.in_features) for layer in layers)
    assert sizes == [rows * columns for rows, columns in shapes], "a copy of more than the matrix that is rounded"


def test_placing_it_automatically_counts_packed_sizes(tiny_model, tmp_path):
    config = AutoRoundConfig(scheme="W2A16G32")
    folder = tiny_model("llama")
    whole = sum(parameter.nbytes for parameter in load(folder, quantization_config=config).parameters())
    floats = sum(parameter.nbytes for parameter in load(folder).parameters())
    budget = {"cpu": int(whole * 1.3)}
    assert whole * 1.3 < floats * 0.6
    offload = {"device_map": "auto", "max_memory": budget, "offload_folder": tmp_path}
    assert "disk" in load(folder, **offload).hf_device_map.values()
    model = load(folder, quantization_config=config, **offload)
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize(("scheme", "codes"), [("W4A16G32", "qweight"), ("MXFP8", "weight"), ("FP8_BLOCK", "weight")])
def test_offloaded_to_disk_it_computes_and_saves_the_same(scheme, codes, tiny_model, tmp_path):
    folder, config, rows = tiny_model("llama"), AutoRoundConfig(scheme=scheme), tokens()[:2]
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load(folder, quantization_config=config, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.get_parameter(codes).device.type == "meta"
    whole = load(folder, quantization_config=config)
    assert torch.equal(model(rows).logits, whole(rows).logits)
    assert_equal(saved(model, tmp_path / "ours"), saved(whole, tmp_path / "theirs"))


def test_the_float_model_can_be_had_again(tiny_model):
    folder, rows = tiny_model("qwen3_moe"), tokens()[:2]
    model = load(folder, quantization_config=AutoRoundConfig(scheme="W4A16G32"))
    logits = model(rows).logits
    plain = model.dequantize()
    assert not [name for name, module in plain.named_modules() if isinstance(module, PackedLinear)]
    assert torch.allclose(plain(rows).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"shceme": "W4A16"}, UnknownName, "no argument 'shceme'; did you mean scheme"),
        ({"scheme": "W4A61"}, UnknownName, "did you mean W4A16"),
        ({"iters": -1}, AutoRoundError, "iters=-1"),
        ({"format": "mlx", "output_dir": "out"}, AutoRoundError, "output_dir='out', format='mlx'.*save_pretrained"),
        ({"device_map": "cpu"}, AutoRoundError, "device_map='cpu'.*give device_map to from_pretrained"),
        ({"layer_config": {"kproj": {"bits": 8}}}, UnknownName, "no layer matches 'kproj'"),
        ({"iters": 1, "dataset": "no/such/file.txt"}, AutoRoundError, "file.txt"),
        ({"iters": 1, "dataset": [[1, 2, 3, 999] * 6]}, AutoRoundError, "token 999"),
        ({"scheme": "BF16"}, AutoRoundError, "nothing|no layer is left"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_sentence(arguments, error, says, tiny_model):
    with pytest.raises(error, match=says):
        load(tiny_model("llama"), quantization_config=AutoRoundConfig(**arguments))


def test_a_model_that_is_spread_cannot_be_calibrated_while_it_loads(tiny_model, tmp_path):
    config = AutoRoundConfig(scheme="W4A16G32", iters=2, dataset=list(tokens(8)))
    with pytest.raises(UnsupportedLayer, match="RoundingTrainer"):
        load(tiny_model("llama"), quantization_config=config, device_map={"": "cpu", "lm_head": "disk"}, offload_folder=tmp_path)


def test_damaged_weights_are_refused_by_name(tiny_model, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        load(tmp_path / "broken", quantization_config=AutoRoundConfig(scheme="W4A16", group_size=32))
