# SPDX-License-Identifier: Apache-2.0
"""How one block's numbers move end to end."""

import pytest
import torch

from hf_autoround.scheme import resolve_scheme
from hf_autoround.tuning.end_to_end import EndToEndSettings, LearnedBlock, first_state
from hf_autoround.tuning.rtn import nearest
from hf_autoround.tuning.task import BlockResult, TunableWeight

SETTINGS = EndToEndSettings(steps=8, lr=0.1)


def learned_block(scheme="W4A16G32"):
    generator = torch.Generator().manual_seed(0)
    parameters = {"weight": torch.randn(8, 64, generator=generator), "norm": torch.ones(64)}
    weights = {"weight": TunableWeight(parameters["weight"], False, resolve_scheme(scheme))}
    norms = {"norm": parameters["norm"]}
    start = BlockResult({"weight": nearest(weights["weight"])})
    return LearnedBlock(weights, norms, ("norm",), first_state(weights, norms, start), torch.float32, torch.float32)


def moved(size, scheme="W4A16G32"):
    """Return what is learned of a block after some steps, its gradients being of this size."""
    block, generator = learned_block(scheme), torch.Generator().manual_seed(1)
    for step in range(SETTINGS.steps):
        gradients = {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in block.replacements().items()}
        block.move(gradients, SETTINGS, step)
    return {key: tensor for key, tensor in block.state.items() if not key.endswith((":first", ":second"))}


@pytest.mark.parametrize("scheme", ["W2A16G32", "W4A16G32", "MXFP4"])
def test_how_large_gradients_are_makes_no_difference(scheme):
    """A model of many weights has small gradients for each of them."""
    start, one, other = learned_block(scheme).state, moved(1.0, scheme), moved(2.0**-32, scheme)
    assert any(key.startswith("weight:") and not torch.equal(one[key], start[key]) for key in one)
    for key in one:
        assert torch.allclose(one[key], other[key], atol=1e-3), key


def test_a_weight_without_gradient_stays():
    block = learned_block()
    before = {key: tensor.clone() for key, tensor in block.state.items()}
    for step in range(3):
        block.move({name: torch.zeros_like(tensor) for name, tensor in block.replacements().items()}, SETTINGS, step)
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state.items())


def test_a_rounding_that_gradients_agree_on_moves_further_than_one_they_do_not():
    block, generator = learned_block(), torch.Generator().manual_seed(2)
    name = next(key for key in block.state if block.state.get(f"{key}:first", torch.ones(())).dtype == torch.bfloat16)
    start = block.state[name].clone()
    noise = torch.randn(SETTINGS.steps, 8, 64, generator=generator)
    noise[:, :4] = noise[:, :4].abs()  # of one sign in half of the rows
    for step in range(SETTINGS.steps):
        block.move({"weight": noise[step], "norm": torch.zeros(64)}, SETTINGS, step)
    way = (block.state[name] - start).abs().flatten(1).mean(1)
    assert way[:4].mean() > 1.5 * way[4:].mean()


@pytest.mark.parametrize(("scheme", "slower"), [("W2A16G32", 1), ("W3A16G32", 4), ("W4A16G32", 16), ("W8A16G32", 4096)])
def test_scales_move_by_the_square_of_what_a_bit_is_worth(scheme, slower):
    first_step = EndToEndSettings(steps=1, lr=0.1, range_lr=0.8)
    block = learned_block(scheme)
    block.move({name: torch.ones_like(tensor) for name, tensor in block.replacements().items()}, first_step, 0)
    moved = (block.state["weight:scale"] - 1).abs().max().item()
    assert moved == pytest.approx(0.8 / 64**0.5 / slower, rel=0.05)  # 64 columns


def test_norms_move_as_far_as_the_coarsest_weight_lets_them():
    first_step, ways = EndToEndSettings(steps=1, lr=0.1, norm_lr=0.5), {}
    for scheme in ("W2A16G32", "W4A16G32"):
        block = learned_block(scheme)
        block.move({name: torch.ones_like(tensor) for name, tensor in block.replacements().items()}, first_step, 0)
        ways[scheme] = (block.state["norm:norm"] - 1).abs().max().item()
    assert ways == pytest.approx({"W2A16G32": 0.5, "W4A16G32": 0.125}, rel=1e-3)
