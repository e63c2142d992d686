# SPDX-License-Identifier: Apache-2.0
"""Optimized round to nearest: no row ends worse than it began by choosing scales, and outputs are better than by search alone."""

import pytest
import torch
from torch import nn

from hf_autoround.layers.sites import oriented
from hf_autoround.numerics.feedback import feedback
from hf_autoround.scheme import integer_scheme, resolve_scheme
from hf_autoround.tuning import BlockTask, TunableWeight, TuningSettings
from hf_autoround.tuning.opt_rtn import choose_groups, optimized_round_to_nearest, searched
from hf_autoround.tuning.rtn import by_rows, nearest


def correlated(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ mixing + 0.5


def test_no_row_ends_worse_than_it_began():
    errors = torch.randn(3, 16, 4, 32, generator=torch.Generator().manual_seed(1))
    inputs = correlated(200, 128).view(200, 4, 32)
    choice = choose_groups(errors, inputs)
    taken = errors.gather(0, choice[None, ..., None].expand(1, 16, 4, 32))[0]

    def row_errors(error):
        return (error.flatten(1) @ inputs.flatten(1).t()).square().sum(-1)

    assert (row_errors(taken) <= row_errors(errors[0]) * (1 + 1e-5)).all()
    assert row_errors(taken).sum() < 0.7 * row_errors(errors[0]).sum()


@pytest.mark.parametrize(
    "scheme", [integer_scheme(2, 32), integer_scheme(2, 32, sym=False), integer_scheme(3)], ids=lambda s: s.name
)
@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_are_nearer_than_by_search_alone(scheme, experts, transposed):
    shape = (experts, 48, 128) if experts else (48, 128)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.05
    parameter = nn.Parameter(oriented(weight, transposed).contiguous())
    rows = correlated(300, 128)
    # the second expert saw nothing: it is rounded to nearest
    inputs = [rows, rows[:0]] if experts else [rows]
    squares = (
        torch.stack([each.square().sum(0, keepdim=True) for each in inputs]) if experts else rows.square().sum(0, keepdim=True)
    )
    tunable = TunableWeight(parameter, transposed, scheme)
    task = BlockTask(0, 1, {"w": tunable}, importance={"w": squares}, inputs={"w": inputs})
    found = optimized_round_to_nearest(task, TuningSettings(), lambda *_: False).layers["w"].weight()
    start = tunable.finished(searched(tunable, squares)).weight()
    assert found.shape == weight.shape
    if experts:
        assert torch.equal(found[1], nearest(tunable).weight()[1]) and torch.equal(start[1], found[1])

    def error(quantized):
        return ((quantized - weight) @ rows.t()).square()[: 1 if experts else None].sum()

    assert error(found) < 0.75 * error(start)


def test_experts_some_at_a_time_are_experts_all_at_once(monkeypatch):
    weight = torch.randn(5, 48, 128, generator=torch.Generator().manual_seed(2)) * 0.05
    inputs = [correlated(300, 128) * (1 + expert) for expert in range(5)]
    squares = torch.stack([each.square().sum(0, keepdim=True) for each in inputs])
    task = BlockTask(
        0, 1, {"w": TunableWeight(weight, False, integer_scheme(3, 32))}, importance={"w": squares}, inputs={"w": inputs}
    )
    at_once = optimized_round_to_nearest(task, TuningSettings(), lambda *_: False).layers["w"]
    monkeypatch.setattr("hf_autoround.tuning.opt_rtn._FACTORS", 2 * 128**2)
    some = optimized_round_to_nearest(task, TuningSettings(), lambda *_: False).layers["w"]
    assert some.error == pytest.approx(at_once.error) and 0 < some.error < 1
    # one order of columns for all that are held together
    assert (some.weight() - weight).norm() < 1.05 * (at_once.weight() - weight).norm()
    for expert, rows in enumerate(inputs):
        errors = [((each.weight()[expert] - weight[expert]) @ rows.t()).norm() for each in (some, at_once)]
        assert errors[0] < 1.1 * errors[1]


def test_weights_with_the_same_inputs_share_their_feedback(monkeypatch):
    rows, others = correlated(300, 128), correlated(300, 128).flip(1)
    seen = {"q": [rows], "k": [rows.clone()], "o": [others], "gate": [rows]}
    weights = {
        name: TunableWeight(torch.randn(48, 128, generator=torch.Generator().manual_seed(place)), False, integer_scheme(3, 32))
        for place, name in enumerate(seen)
    }
    squares = {name: inputs[0].square().sum(0, keepdim=True) for name, inputs in seen.items()}
    asked = []

    def counted(inputs):
        asked.append(inputs)
        return feedback(inputs)

    monkeypatch.setattr("hf_autoround.tuning.opt_rtn.feedback", counted)

    def found(names):
        task = BlockTask(0, 1, {name: weights[name] for name in names}, importance=squares, inputs=seen)
        return optimized_round_to_nearest(task, TuningSettings(), lambda *_: False).layers

    together = found(seen)
    assert [inputs[0] is each for inputs, each in zip(asked, (rows, others, rows), strict=True)] == [True] * 3
    for name in seen:
        assert torch.equal(together[name].weight(), found([name])[name].weight())


@pytest.mark.parametrize("known", [True, False], ids=["range known", "range not known"])
def test_one_scale_for_a_tensor_is_searched_whole(known, monkeypatch):
    monkeypatch.setattr("hf_autoround.tuning.opt_rtn._CHUNK", 8 * 128)  # several chunks of rows
    weight = torch.randn(2, 48, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    grid = (
        torch.randn(48, 128, generator=torch.Generator().manual_seed(4)).mul(60).clamp(-256, 256).to(torch.float8_e4m3fn).float()
    )
    grid[0, 0], weight[0] = 256, grid / 1024  # without an error, if the largest does not fall on 448
    squares = torch.stack([torch.linspace(0.01, 1, 128).square()[None], torch.zeros(1, 128)])  # the second expert saw nothing
    largest = weight.abs().amax((1, 2)).view(2, 1, 1, 1).expand(2, 48, 1, 1) if known else None
    tunable = TunableWeight(weight, False, resolve_scheme("FPW8A16"), largest)
    task = BlockTask(0, 1, {"w": tunable}, importance={"w": squares})
    found = optimized_round_to_nearest(task, TuningSettings(), lambda *_: False).layers["w"]
    plain = nearest(tunable)
    if known:  # each expert has a scale of its own
        assert [len(scales.unique()) for scales in found.tensor.scale] == [1, 1]
        assert torch.equal(found.weight()[1], plain.weight()[1])

    def error(layer):
        return ((layer.weight() - weight).square() * squares).sum()

    assert error(found) < 0.1 * error(plain)
    merged = by_rows(tunable, lambda rows: searched(rows, None), 8 * 128).tensor  # as an adapter is merged
    assert len(merged.scale[0].unique()) == 1
