# SPDX-License-Identifier: Apache-2.0
"""SignRound: rounding and scales tuned by their gradient, block by block (https://arxiv.org/abs/2309.05516).

The start is round to nearest under searched scales. Four choices differ from the paper's code: Adam moves what is learned, by
default, and not the sign of the gradient; the best step is chosen on a fixed set of samples, the start among the candidates,
so tuning never ends worse than it began on what it measures; the norm weights may move too; and the last block is given the
KL divergence of the predictions as its error, not that of its output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_autoround.numerics import Tunables
from hf_autoround.tuning.opt_rtn import searched
from hf_autoround.tuning.optimizers import ADAM_EPS, Adam, SignSGD
from hf_autoround.tuning.samples import batches, split
from hf_autoround.tuning.task import BlockResult, BlockTask, OnStep, TuningSettings


def sign_round(task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult:
    """Tune one block; `on_step` may stop it early."""
    assert task.error is not None
    state = _State(task, settings)
    training, selection = split(task.samples, settings.selection_samples)
    first = best = _error(task, state.replacements(), selection, settings.batch_size)
    kept, best_step = state.snapshot(), 0
    order = batches(training, task.seed, settings.batch_size, settings.gradient_accumulate_steps)
    for step in range(settings.iters):
        rate = 1 - step / settings.iters
        loss = state.step(next(order), rate)
        stop = on_step(step, loss, rate * state.lr)
        last = stop or step + 1 == settings.iters
        if last or (step + 1) % settings.selection_every == 0:
            error = _error(task, state.replacements(), selection, settings.batch_size)
            if error < best:  # false for NaN
                best, best_step, kept = error, step + 1, state.snapshot()
        if stop:
            break
    tunables, tuned = kept
    layers = {name: weight.finished(tunables[name]) for name, weight in task.weights.items()}
    return BlockResult(layers, tuned, tunables if settings.keep_tunables else {}, first, best, best_step)


class _State:
    """The learned tensors of a block and the two optimizers that move them."""

    def __init__(self, task: BlockTask, settings: TuningSettings) -> None:
        self.task, self.settings = task, settings
        self.groups = {name: weight.groups() for name, weight in task.weights.items()}
        self.tunables: dict[str, Tunables] = {}
        self.lr = settings.rate
        by_rate: dict[float, list[Tensor]] = {}
        for name, weight in task.weights.items():
            start = searched(weight, task.importance.get(name))
            range_lr = (
                settings.minmax_lr if settings.minmax_lr is not None else self.lr * weight.data_type.range_rate(weight.spec)
            )
            rates = start.rates()
            for part, tensor in start.learned().items():
                if rates[part] == "rounding":
                    by_rate.setdefault(self.lr, []).append(tensor.requires_grad_())
                elif settings.enable_minmax_tuning:
                    by_rate.setdefault(range_lr, []).append(tensor.requires_grad_())
            self.tunables[name] = start
        self.norms = {}
        if settings.enable_norm_bias_tuning:
            self.norms = {name: norm.detach().float().clone().requires_grad_() for name, norm in task.norms.items()}
        groups = [{"params": tensors, "lr": lr} for lr, tensors in by_rate.items()]
        self.optimizers: list[torch.optim.Optimizer] = [
            Adam(groups) if settings.enable_adam else SignSGD(groups, settings.momentum)
        ]
        if self.norms:
            # relative to their size: some models store norm weights around 1, some around 0, and biases are anything
            sizes = {name: max(norm.detach().square().mean().sqrt().item(), 1e-3) for name, norm in self.norms.items()}
            groups = [{"params": [norm], "lr": settings.norm_lr * sizes[name]} for name, norm in self.norms.items()]
            self.optimizers.append(torch.optim.Adam(groups, eps=ADAM_EPS))
        self.initial = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    @torch.no_grad()
    def replacements(self) -> dict[str, Tensor]:
        """Return the weights and norms that the block runs on at this point, in its own dtype."""
        return {name: self._replacement(name) for name in (*self.task.weights, *self.norms)}

    def _replacement(self, name: str) -> Tensor:
        """Return one of them, differentiable."""
        if name in self.norms:
            return self._as_shipped(self.norms[name]).to(self.task.norms[name].dtype)
        weight = self.task.weights[name]
        return weight.fake_quantized(self.groups[name], self.tunables[name]).to(weight.parameter.dtype)

    def step(self, micro_batches: list[Tensor], rate: float) -> float:
        """Do one step on these samples at `rate` (1 to 0) of the learning rates; return the loss before it."""
        # Leaves between weights and block: the block's backward runs once per micro-batch, the quantizer's once per step,
        # computed again weight by weight, so that what it needs of all weights never exists beside the block's activations.
        leaves = {name: weight.detach().requires_grad_() for name, weight in self.replacements().items()}
        total, count = 0.0, sum(len(indices) for indices in micro_batches)
        for indices in filter(len, map(self.task.share, micro_batches)):
            loss = self.task.error(indices, leaves)  # type: ignore[misc]
            (loss * (len(indices) / count)).backward()
            total += loss.item() * len(indices) / count
        while leaves:
            name, leaf = leaves.popitem()
            self._replacement(name).backward(self.task.total(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad))
        for optimizer, initial in zip(self.optimizers, self.initial, strict=True):
            for group, lr in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for tunables in self.tunables.values():
                tunables.clamp_()
        return _sum(self.task, total)

    def snapshot(self) -> tuple[dict[str, Tunables], dict[str, Tensor]]:
        """Return copies of what is learned: tunables, and norms in the model's dtype."""
        tunables = {
            name: tunables.with_learned({part: tensor.detach().clone() for part, tensor in tunables.learned().items()})
            for name, tunables in self.tunables.items()
        }
        return tunables, {name: self._as_shipped(norm.detach()).clone() for name, norm in self.norms.items()}

    def _as_shipped(self, norm: Tensor) -> Tensor:
        return norm.to(self.task.stored_dtype)


@torch.no_grad()
def _error(task: BlockTask, weights: Mapping[str, Tensor], indices: Tensor, batch_size: int) -> float:
    """Return the mean error on samples `indices`."""
    own = task.share(indices)
    total = sum(task.error(batch, weights).item() * len(batch) for batch in own.split(batch_size) if len(batch))  # type: ignore[misc]
    return _sum(task, total) / len(indices)


def _sum(task: BlockTask, share: float) -> float:
    return task.total(torch.tensor(share, dtype=torch.float64)).item()
