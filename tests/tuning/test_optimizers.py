# SPDX-License-Identifier: Apache-2.0
"""How tunables follow their gradient."""

import pytest
import torch
from torch import Tensor

from hf_autoround import RoundingArguments
from hf_autoround.tuning import optimizers
from hf_autoround.tuning.optimizers import ADAM_BETAS, ADAM_EPS, Adam, SignSGD


def walked(optimizer_of, gradients: list[Tensor], start: Tensor | None = None) -> Tensor:
    """Return where a parameter ends that starts at zero, or in `start`."""
    parameter = (torch.zeros_like(gradients[0]) if start is None else start).requires_grad_()
    optimizer = optimizer_of([{"params": [parameter], "lr": 0.1}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.fixture
def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 33, generator=generator) for _ in range(20)]


def test_moments_in_bfloat16_walk_where_those_in_float32_do(gradients):
    ours = walked(Adam, gradients)
    torchs = walked(lambda groups: torch.optim.Adam(groups, betas=ADAM_BETAS, eps=ADAM_EPS), gradients)
    assert (ours - torchs).abs().max() < 0.02 * torchs.abs().max()


def test_adam_does_not_see_how_small_gradients_are(gradients):
    tiny = [gradient * 2.0**-40 for gradient in gradients]
    assert torch.allclose(walked(Adam, gradients), walked(Adam, tiny), rtol=1e-3)


def test_without_a_fused_kernel_the_steps_are_the_same(gradients, monkeypatch):
    fused = walked(Adam, gradients)
    plain = optimizers.adam
    monkeypatch.setattr(optimizers, "adam", lambda *args, **kwargs: plain(*args, **{**kwargs, "fused": False}))
    assert torch.allclose(fused, walked(Adam, gradients), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("optimizer_of", [Adam, SignSGD], ids=["adam", "sign"])
@pytest.mark.parametrize("strided", ["parameter", "gradient"])
def test_the_way_that_memory_lies_changes_nothing(optimizer_of, strided, gradients):
    across = [gradient.T.contiguous().T for gradient in gradients]
    assert not across[0].is_contiguous()
    first = torch.zeros_like(across[0]) if strided == "parameter" else torch.zeros(4, 33)
    other = gradients if strided == "parameter" else across
    # a kernel rounds what is left over at the end of a row its own way
    assert torch.allclose(walked(optimizer_of, gradients), walked(optimizer_of, other, first), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ({"iters": 100}, 0.02),
        ({"iters": 100, "enable_adam": False}, 0.01),
        ({"iters": 100, "lr": 0.5}, 0.5),
    ],
    ids=["adam", "sign", "given"],
)
def test_the_rate_follows_from_the_number_of_steps(arguments, rate):
    assert RoundingArguments(**arguments).tuning().rate == pytest.approx(rate)
