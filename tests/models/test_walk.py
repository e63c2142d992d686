# SPDX-License-Identifier: Apache-2.0
"""The walk over the blocks: every block gets its own arguments, the chain ends where the model does."""

import pytest
import torch
from tiny import CONFIGS, tokens
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, BambaConfig, MambaConfig, Zamba2Config

from hf_autoround.errors import CheckpointError, UnsupportedLayer
from hf_autoround.layers.fake_quantized_block import InputStatistics, watch_inputs
from hf_autoround.models.attention import use_chunked_attention
from hf_autoround.models.blocks import find_sites, model_parts
from hf_autoround.models.loading import load_keys, open_model
from hf_autoround.models.walk import BlockRunner, capture, finish

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunked", [False, True], ids=["sdpa", "chunked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_run_one_by_one_give_the_models_own_hidden_states(name, chunked, tiny_model):
    folder, rows = tiny_model(name), tokens(6, 20)
    lazy = open_model(folder)
    if chunked:
        use_chunked_attention(lazy.model)
    parts = model_parts(lazy.model)
    load_keys(lazy, lazy.keys, CPU, torch.float32)
    blocks = [lazy.model.get_submodule(block) for block in parts.block_names]
    captured = capture(lazy.model, blocks, rows, CPU)
    hidden = captured.hidden
    for block_name, block, arguments in zip(parts.block_names, blocks, captured.arguments, strict=True):
        hidden = BlockRunner((block_name,), (block,), (arguments,), CPU).all(hidden, {}, batch_size=4)
    last = finish(lazy.model, blocks, rows, hidden, CPU, captured.returns_tuple)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.base_model(rows, use_cache=False).last_hidden_state
    torch.testing.assert_close(last, expected, rtol=2e-5, atol=2e-5)


def test_sliding_window_blocks_get_their_own_masks(tiny_model):
    lazy = open_model(tiny_model("gemma3"))
    load_keys(lazy, lazy.keys, CPU, torch.float32)
    captured = capture(lazy.model, list(lazy.model.model.layers), tokens(2, 20), CPU)
    masks = [arguments.at(torch.tensor([0]), CPU)[1]["attention_mask"] for arguments in captured.arguments]
    kinds = {kind: mask for kind, mask in zip(lazy.model.config.layer_types, masks, strict=False)}
    assert kinds["sliding_attention"] is not None
    assert all(not arguments.varying for arguments in captured.arguments), "equal for all samples: kept once"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_sees_its_inputs(name, tiny_model):
    lazy = open_model(tiny_model(name))
    load_keys(lazy, lazy.keys, CPU, torch.float32)
    parts = model_parts(lazy.model)
    parameters = {
        site.parameter: (lazy.model.get_parameter(site.parameter), site.transposed)
        for site in find_sites(lazy.model)
        if parts.block_of(site.name) is not None
    }
    statistics = InputStatistics()
    with watch_inputs(parameters, statistics), torch.no_grad():
        lazy.model(tokens(8, 20), use_cache=False)
    assert statistics.squares.keys() == parameters.keys()
    for parameter, (tensor, transposed) in parameters.items():
        columns = tensor.shape[-2 if transposed else -1]
        assert statistics.squares[parameter].shape == (*tensor.shape[:-2], 1, columns)
        per_expert = 2 if tensor.ndim == 3 else 1
        assert int(statistics.rows[parameter].sum()) == 8 * 20 * per_expert


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_experts_have_few_shapes_where_kernels_are_compiled_for_each(autocast, tiny_model):
    lazy = open_model(tiny_model("qwen3_moe"))
    load_keys(lazy, lazy.keys, CPU, torch.float32)
    parts, rows = model_parts(lazy.model), tokens(6, 23)
    blocks = [lazy.model.get_submodule(block) for block in parts.block_names]
    captured = capture(lazy.model, blocks, rows, CPU)
    name, weights = parts.block_names[-1], {}  # the first one is dense
    for site in find_sites(lazy.model):
        if site.parameter.startswith(name):
            weights[site.parameter] = lazy.model.get_parameter(site.parameter).detach()

    class Rows(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[int] = set()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear and args[0].ndim == 2:
                self.seen.add(len(args[0]))
            return func(*args, **(kwargs or {}))

    runner = BlockRunner((name,), blocks[-1:], captured.arguments[-1:], CPU, autocast)
    with torch.no_grad(), Rows() as watched:
        found = runner(captured.hidden[:4], torch.arange(4), weights)
    assert watched.seen and all(rows % 64 == 0 for rows in watched.seen) == (autocast is not None)
    torch.testing.assert_close(found, runner(captured.hidden[:4], torch.arange(4), {}), rtol=0, atol=1e-2 if autocast else 1e-5)


def test_a_watched_input_is_summed_exactly(tiny_model):
    lazy = open_model(tiny_model("llama"))
    load_keys(lazy, lazy.keys, CPU, torch.float32)
    layer = lazy.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    statistics = InputStatistics()
    with watch_inputs({"q": (layer.weight, False)}, statistics), torch.no_grad():
        lazy.model(tokens(4, 20), use_cache=False)
    torch.testing.assert_close(statistics.squares["q"][0], seen[0].flatten(0, 1).square().sum(0))


@pytest.mark.parametrize("kept", [0, 3, 64])
def test_rows_are_kept_only_as_many_as_asked_for(kept, tiny_model):
    lazy = open_model(tiny_model("qwen3_moe"))
    load_keys(lazy, lazy.keys, CPU, torch.float32)
    parameters = {site.parameter: (lazy.model.get_parameter(site.parameter), site.transposed) for site in find_sites(lazy.model)}
    statistics = InputStatistics(kept=kept)
    with watch_inputs(parameters, statistics), torch.no_grad():
        lazy.model(tokens(8, 20), use_cache=False)
    for name, (tensor, _) in parameters.items():
        counts = [len(rows) for rows in statistics.inputs(name)]
        assert max(counts) <= -(-kept // 8) if tensor.ndim == 3 else kept // 2 <= counts[0] <= kept


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Zamba2Config(), "zamba2 model.*share one transformer layer's weights"),
        (MambaConfig(), "mamba model.*outside of matrix products"),
        (BambaConfig(), "bamba model"),
    ],
    ids=["zamba2", "mamba", "bamba"],
)
def test_what_cannot_be_walked_is_refused_by_name_before_any_work(config, why, tmp_path, tiny_model):
    from safetensors.torch import save_file

    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedLayer, match=why):
        open_model(tmp_path)


def test_shared_blocks_are_refused_by_name(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(UnsupportedLayer, match=r"model\.layers\.2 shares weights with model\.layers\.0"):
        model_parts(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: _cut(folder / "model.safetensors", 1000), "model.safetensors has .* bytes where its header promises"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
            "model.safetensors is cut off inside its header",
        ),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json cannot be used"),
    ],
    ids=["no weights", "no config", "truncated", "garbage", "no model type"],
)
def test_damaged_checkpoints_are_found_when_they_are_opened(damage, message, tiny_model, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_model(folder)


def test_a_folder_that_is_not_there_and_one_that_is_quantized(tmp_path, tiny_model):
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither a folder nor a model that the Hub gives us"):
        open_model("some/model-that-is-not-there")
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    import shutil

    shutil.copytree(tiny_model("llama"), tmp_path / "quantized")
    config.save_pretrained(tmp_path / "quantized")
    with pytest.raises(CheckpointError, match=r"is already quantized \(gptq\); start from its float checkpoint"):
        open_model(tmp_path / "quantized")


def _cut(path, count):
    content = path.read_bytes()
    path.write_bytes(content[:-count])
