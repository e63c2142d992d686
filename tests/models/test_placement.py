# SPDX-License-Identifier: Apache-2.0
"""device_map: what it can say, what it cannot, and one block's layers on two devices."""

import pytest
import torch
from tiny import CONFIGS, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from hf_autoround import RoundingArguments, RoundingTrainer
from hf_autoround.errors import AutoRoundError, UnknownName
from hf_autoround.layers.fake_quantized_block import run_block
from hf_autoround.models.blocks import model_parts
from hf_autoround.models.placement import Placement, resolve_placement

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def two_accelerators(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("device_map", "placement"),
    [
        (None, Placement(FIRST)),
        ("auto", Placement(FIRST, (SECOND,))),
        (1, Placement(SECOND)),
        ("1", Placement(SECOND)),
        ("cuda:1", Placement(SECOND)),
        ("cpu", Placement(CPU)),
        ("0,1", Placement(FIRST, (SECOND,))),
        ([1, "cuda:0"], Placement(SECOND, (FIRST,))),
        ({"q_proj": 1}, Placement(FIRST, patterns=(("q_proj", SECOND),))),
        ({"": 1, r"layers\.0\.": "cpu"}, Placement(SECOND, patterns=((r"layers\.0\.", CPU),))),
    ],
    ids=str,
)
def test_what_a_device_map_means(device_map, placement, two_accelerators):
    assert resolve_placement(device_map) == placement


@pytest.mark.parametrize(
    ("device_map", "why"),
    [
        (2, "there are 2 such devices"),
        ("xpu:0", "has no xpu device"),
        ("gpu", "is no device"),
        ([], "empty list"),
        ({"q_proj": 7}, "there are 2"),
        ({"*.mlp": 1}, r"'\*.mlp' is no regular expression \(nothing to repeat"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(device_map, why, two_accelerators):
    with pytest.raises(AutoRoundError, match=why):
        resolve_placement(device_map)


@pytest.mark.parametrize("device_map", [None, "auto", "cuda"])
def test_one_of_several_processes_works_on_its_own_device(device_map):
    assert resolve_placement(device_map, own=SECOND) == Placement(SECOND)


@pytest.mark.parametrize("device_map", [0, "cuda:1", "0,1", [0, 1], (0, 1), {"q_proj": 1}, "cpu"], ids=str)
def test_one_of_several_processes_takes_no_other_device(device_map):
    with pytest.raises(AutoRoundError, match=r"with several processes: each works on the device that its launcher gave it"):
        resolve_placement(device_map, own=SECOND)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large, self.norm = nn.Linear(8, 8), nn.Linear(8, 64), nn.LayerNorm(8)


def assigned(placement):
    return placement._assign("model.layers.3", Block())


def test_layers_are_shared_out_by_size_and_patterns_come_first():
    assert assigned(Placement(FIRST)) == {}
    assert assigned(Placement(FIRST, (SECOND,))) == {"large": SECOND}
    assert assigned(Placement(FIRST, patterns=(("small", CPU),))) == {"small": CPU}
    assert assigned(Placement(FIRST, (SECOND,), ((r"layers\.3\.large", CPU),))) == {"large": CPU, "small": SECOND}
    assert assigned(Placement(FIRST, patterns=(("layers.4", CPU),))) == {}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("q_prj", "'q_prj' matches no layer .* did you mean q_proj"), ("lm_head", "everything else is on the main device")],
)
def test_a_pattern_that_matches_no_layer_is_refused_before_any_work(pattern, says, tiny_model, tmp_path):
    args = RoundingArguments(output_dir=str(tmp_path / "out"), device_map={pattern: "cpu"})
    with pytest.raises(UnknownName, match=says):
        RoundingTrainer(tiny_model("llama"), args).prepare()


@pytest.mark.parametrize(("architecture", "layers"), [("gpt_oss", {"mlp.experts"}), ("gpt2", {"mlp.c_fc", "mlp.c_proj"})])
def test_fused_experts_and_transposed_layers_are_spread_too(architecture, layers, other_device):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], experts_implementation="eager").eval()
    block = model.get_submodule(model_parts(model).block_names[1])
    inputs = tokens(2, 8)
    expected = model(inputs).logits
    placement = Placement(CPU, patterns=(("mlp", other_device),))
    assert placement._assign("", block).keys() == layers
    placement.spread("", block)
    assert {parameter.device.type for name in layers for parameter in block.get_submodule(name).parameters()} == {"lazy"}
    torch.testing.assert_close(model(inputs).logits, expected)


class GatedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, hidden):
        return hidden + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


def test_a_block_on_two_devices_computes_what_it_does_on_one(other_device):
    block = GatedBlock().requires_grad_(False)
    hidden = torch.randn(2, 3, 8)

    def result(weights):
        output = run_block(block, hidden, (), {}, weights)
        output.square().sum().backward()
        return output.detach(), {name: weight.grad for name, weight in weights.items()}

    expected, gradients = result({name: weight.clone().requires_grad_() for name, weight in block.named_parameters()})
    placement = Placement(CPU, (other_device,))
    placement.spread("block", block)
    assert {parameter.device.type for parameter in block.parameters()} == {"cpu", "lazy"}
    output, moved = result({name: weight.clone().requires_grad_() for name, weight in block.named_parameters()})
    assert output.device == CPU
    torch.testing.assert_close(output, expected)
    for name, gradient in moved.items():
        torch.testing.assert_close(gradient.cpu(), gradients[name])
    placement.gather(block)
    assert "_hf_hook" not in block.up.__dict__
