# SPDX-License-Identifier: Apache-2.0
"""End to end: the rounding of all blocks tuned together against the float model's predictions.

A smaller error of a block's output is often not a better model; a smaller KL divergence of the predictions is. So the
tunables of every block (the same that block tuning moves) follow the gradient of the KL divergence to the float model by
Adam (https://arxiv.org/abs/1412.6980). The sign of one step's gradient is mostly noise, from few samples and here from all other
blocks' rounding on the move: a code that hardly matters should not walk as far as one that does.
A few positions would have most of the gradient, so each counts with the root of its own (`teacher.evened`).
Relatives: SignRound (https://arxiv.org/abs/2309.05516) for what is tuned, EfficientQAT (https://arxiv.org/abs/2407.11062)
for tuning end to end, there with the codes frozen.

One block is open at a time, forward and then backward in reverse: only its inputs are kept between the two (or all that
its backward needs, for as many blocks as there is room), and it is moved as soon as its own gradient is there, so gradients
of two blocks never exist together.

Shapes: B samples of a batch, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from hf_autoround.errors import CalibrationError
from hf_autoround.numerics import Tunables
from hf_autoround.tuning.optimizers import adam_
from hf_autoround.tuning.rtn import resumed
from hf_autoround.tuning.samples import batches, split
from hf_autoround.tuning.task import BlockResult, TunableWeight


@dataclass(frozen=True)
class EndToEndSettings:
    """How the stage goes. Rates are those of the first step: `lr` of the rounding, `range_lr` of the scales and `norm_lr` of the
    norms (`LearnedBlock.move` has their rules). Held-out samples choose the best of twenty steps, or of every 25th.

    With `left` going from 1 to 0 the rate of the rounding falls as left^1.7, the others as left^2: what they move near the
    end is noise.
    """

    steps: int
    lr: float
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    range_lr: float = 0.1
    norm_lr: float = 3e-3
    tunes_range: bool = True
    tunes_norms: bool = True
    held_out: int = 16

    @property
    def measure_every(self) -> int:
        """After how many steps held-out samples are measured."""
        return max(25, self.steps // 20)

    def rate(self, step: int) -> float:
        """Return the rate of the rounding at a step."""
        return self.lr * (1 - step / self.steps) ** 1.7


@dataclass(frozen=True)
class LearnedBlock:
    """One block: its float parameters, and what is learned about them, which is changed in place.

    `weights` are quantized, `fixed` are the other parameters. `state` holds, by `parameter:part`, the tensors of the
    weights' tunables, float32 values of the `norms` (which ship as `stored_dtype`), and Adam's two moments of both.
    Weights reach products as `product_dtype`.
    """

    weights: Mapping[str, TunableWeight]
    fixed: Mapping[str, Tensor]
    norms: tuple[str, ...]
    state: Mapping[str, Tensor]
    stored_dtype: torch.dtype
    product_dtype: torch.dtype

    @property
    def learned(self) -> list[str]:
        """The names of the parameters that tuning changes."""
        return [*self.weights, *self.norms]

    def tunables(self, name: str) -> Tunables:
        """Return the tunables of a weight; their tensors are those of the state."""
        kind = self.weights[name].data_type.tunables
        parts = {part.name: self.state.get(f"{name}:{part.name}") for part in fields(kind)}
        return kind.of({part: tensor for part, tensor in parts.items() if tensor is not None})

    @torch.no_grad()
    def replacements(self) -> dict[str, Tensor]:
        """Return all parameters of the block as the quantized model has them, weights as products take them."""
        values = dict(self.fixed)
        for name, weight in self.weights.items():
            values[name] = weight.fake_quantized(weight.groups(), self.tunables(name)).to(self.product_dtype)
        return values | {name: self._shipped(name).to(self.fixed[name].dtype, copy=True) for name in self.norms}

    def finished(self) -> BlockResult:
        """Return what ships."""
        layers = {name: weight.finished(self.tunables(name)) for name, weight in self.weights.items()}
        return BlockResult(layers, {name: self._shipped(name).clone() for name in self.norms})

    @torch.no_grad()
    def move(self, gradients: Mapping[str, Tensor], settings: EndToEndSettings, step: int) -> None:
        """Do step number `step` (from 0) with these gradients of the `replacements`.

        A scale moves a group of weights, and a norm whole rows, all in one direction: what noise moves them by adds up in the
        outputs, where that of single codes cancels. So scales are slow, the wider a row the more, and both are slower where a
        weight's own error is small: the square of the data type's `range_rate` for scales, that of the coarsest weight for
        norms, whose rate is also relative to their size. (Scales at 2e-2 times that rate and norms at 3e-3 of their size:
        opt-wiki at 4 bits ends 14 % farther away.)
        """
        left = 1 - step / settings.steps
        range_rates = {name: weight.data_type.range_rate(weight.spec) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            tunables = self.tunables(name)
            live = {part: tensor.detach().requires_grad_() for part, tensor in tunables.learned().items()}
            with torch.enable_grad():
                values = weight.fake_quantized(weight.groups(), tunables.with_learned(live))
            found = torch.autograd.grad(values, list(live.values()), gradients[name].to(values.dtype))
            for part, gradient in zip(live, found, strict=True):
                if tunables.rates()[part] == "rounding":
                    self._adam(f"{name}:{part}", gradient, settings.rate(step), step)
                elif settings.tunes_range:
                    range_lr = settings.range_lr * range_rates[name] ** 2 / weight.columns**0.5
                    self._adam(f"{name}:{part}", gradient, range_lr * left**2, step)
            tunables.clamp_()
        coarsest = max(range_rates.values(), default=1.0)
        for name in self.norms:
            size = max(self.fixed[name].float().square().mean().sqrt().item(), 1e-3)
            self._adam(f"{name}:norm", gradients[name].float(), settings.norm_lr * coarsest * size * left**2, step)

    def _adam(self, key: str, gradient: Tensor, lr: float, step: int) -> None:
        adam_(self.state[key], gradient, (self.state[f"{key}:first"], self.state[f"{key}:second"]), lr, step)

    def _shipped(self, norm: str) -> Tensor:
        return self.state[f"{norm}:norm"].to(self.stored_dtype)


@torch.no_grad()
def first_state(weights: Mapping[str, TunableWeight], norms: Mapping[str, Tensor], result: BlockResult) -> dict[str, Tensor]:
    """Return the `state` of a block that begins with the result of the stage before; `norms` are the float model's.

    Rounding is float32, as codes are decided near the end, in small steps: the more steps and blocks, the smaller; its moments
    are bfloat16, which loses nothing (benchmarks/README.md).
    """
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        begun = result.tunables.get(name) or resumed(weight, result.layers[name].tensor)
        rates = begun.rates()
        for part, tensor in begun.tensors().items():
            key = f"{name}:{part}"
            state[key] = tensor
            if part in rates:
                dtype = torch.bfloat16 if rates[part] == "rounding" else torch.float32
                state |= {f"{key}:{moment}": torch.zeros_like(tensor, dtype=dtype) for moment in ("first", "second")}
    for name, norm in norms.items():
        value = result.tuned.get(name, norm).float()
        key = f"{name}:norm"
        state |= {key: value, f"{key}:first": torch.zeros_like(value), f"{key}:second": torch.zeros_like(value)}
    return state


@dataclass(frozen=True)
class EndToEndTask:
    """A model as functions: `blocks` blocks in a row and a head.

    `open(place)` gives the LearnedBlock at a place (the head's after the blocks, if `learns_head`) on the device of its
    products, for the duration of a `with`; what was changed in it stays if `changes`. `inputs(samples)` are the first
    block's inputs (B, T, H), `run(place, hidden, samples, parameters)` a block's outputs; `measure(hidden, samples,
    head's parameters)` is the sum of the KL divergence over the samples' tokens, `backward` that and what to follow for less of
    it: the gradient of `scale` times the sum, evened out among tokens (`teacher.evened`). `tokens` is T.
    Samples may be shared out as in BlockTask.

    The forward of the last `kept_blocks()` blocks is kept for their backward, that of the others is computed twice;
    `one_kept(bytes)` tells how much memory one takes. `keep(place, hidden)` is told what enters the others, and returns what
    gives it back for the backward: it may wait elsewhere.
    """

    seed: int
    samples: int
    tokens: int
    blocks: int
    learns_head: bool
    open: Callable[[int, bool], AbstractContextManager[LearnedBlock]]
    inputs: Callable[[Tensor], Tensor]
    run: Callable[[int, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    measure: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    backward: Callable[[Tensor, Tensor, Mapping[str, Tensor], float], tuple[Tensor, Tensor]]
    share: Callable[[Tensor], Tensor] = lambda indices: indices
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    kept_blocks: Callable[[], int] = lambda: 1
    one_kept: Callable[[int], None] = lambda size: None
    keep: Callable[[int, list[Tensor]], Callable[[], list[Tensor]]] = lambda place, hidden: lambda: hidden


@dataclass(frozen=True)
class Progress:
    """How far the stage has come: steps done, the best held-out KL divergence per token so far and its step."""

    step: int = 0
    best: float = float("inf")
    best_step: int = 0


class EndToEndWatcher(Protocol):
    """Who keeps what is found. Between steps the blocks hold the numbers of `progress.step`."""

    def step_ends(self, step: int, loss: float, lr: float) -> bool: ...
    def measured(self, progress: Progress, held_out: float) -> None: ...
    def may_save(self, progress: Progress) -> None: ...


def end_to_end(task: EndToEndTask, settings: EndToEndSettings, watcher: EndToEndWatcher, progress: Progress) -> Progress:
    """Tune from `progress` on; the start is among the candidates. `measured` with `best_step` equal to `step` is told of
    every new best. Return where it ended; the watcher may have stopped it early."""
    training, held_out = split(task.samples, settings.held_out)
    order = batches(training, task.seed, settings.batch_size, settings.gradient_accumulate_steps)
    if progress.step == 0 and progress.best == float("inf"):
        progress = _measured(task, settings, watcher, progress, held_out)
    for step, micro_batches in enumerate(islice(order, progress.step, settings.steps), progress.step):
        loss = _step(task, settings, micro_batches, step)
        progress = Progress(step + 1, progress.best, progress.best_step)
        stop = watcher.step_ends(step, loss, settings.rate(step))
        last = stop or progress.step == settings.steps
        if last or progress.step % settings.measure_every == 0:
            progress = _measured(task, settings, watcher, progress, held_out)
        if stop:
            break
        watcher.may_save(progress)
    return progress


def _measured(
    task: EndToEndTask, settings: EndToEndSettings, watcher: EndToEndWatcher, progress: Progress, held_out: Tensor
) -> Progress:
    kl = _held_out(task, settings, held_out)
    if progress.step == 0 and not isfinite(kl):
        raise CalibrationError(
            "the predictions of the quantized model that end to end tuning begins with hold NaN or infinity; more bits, "
            "or disable_amp, may help"
        )
    if kl < progress.best:  # false for NaN
        progress = Progress(progress.step, kl, progress.step)
    watcher.measured(progress, kl)
    return progress


def _step(task: EndToEndTask, settings: EndToEndSettings, micro_batches: list[Tensor], step: int) -> float:
    """Move every block once; return the training KL divergence per token before it."""
    own = [indices for indices in map(task.share, micro_batches) if len(indices)]
    scale = 1 / (sum(map(len, micro_batches)) * task.tokens)
    hidden = [task.inputs(indices) for indices in own]
    entering: list[Callable[[], list[Tensor]]] = []
    recorded: list[_Recorded] = []
    for place in range(task.blocks):
        if task.blocks - place > max(1, task.kept_blocks()):
            entering.append(task.keep(place, hidden))
            hidden = _outputs(task, place, hidden, own)
        else:
            with task.open(place, False) as block:
                recorded.append(_record(task, place, block, hidden, own))
            del block
            hidden = [output.detach() for output in recorded[-1].outputs]
    task.one_kept(recorded[-1].saved_bytes)
    loss, gradients = _head(task, settings, hidden, own, scale, step)
    for place in reversed(range(task.blocks)):
        with task.open(place, True) as block:
            record = recorded.pop() if recorded else _record(task, place, block, entering.pop()(), own)
            gradients = record.backward(gradients)
            _move(task, settings, block, record.parameters, step)
            del record  # before the next block is there
    return (task.total(loss) * scale).item()


@torch.no_grad()
def _outputs(task: EndToEndTask, place: int, hidden: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    """Return what a block makes of its inputs, micro-batch by micro-batch."""
    with task.open(place, False) as block:
        parameters = block.replacements()
        return [task.run(place, state, indices, parameters) for state, indices in zip(hidden, own, strict=True)]


@dataclass(frozen=True)
class _Recorded:
    """One block's forward with what its backward needs."""

    parameters: dict[str, Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    saved_bytes: int

    def backward(self, gradients: list[Tensor]) -> list[Tensor]:
        """Give the parameters their gradients from those of the outputs; return those of the inputs, if they take any."""
        for output, gradient in zip(self.outputs, gradients, strict=True):
            output.backward(gradient)
        return [state.grad for state in self.inputs if state.grad is not None]


def _record(task: EndToEndTask, place: int, block: LearnedBlock, hidden: list[Tensor], own: list[Tensor]) -> _Recorded:
    parameters = _leaves(block)
    inputs = [state.detach().requires_grad_(place > 0) for state in hidden]
    if task.kept_blocks():
        with torch.enable_grad():
            outputs = [task.run(place, state, indices, parameters) for state, indices in zip(inputs, own, strict=True)]
        return _Recorded(parameters, inputs, outputs, 0)
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = [task.run(place, state, indices, parameters) for state, indices in zip(inputs, own, strict=True)]
    return _Recorded(parameters, inputs, outputs, sum(saved.values()))


def _head(
    task: EndToEndTask, settings: EndToEndSettings, outputs: list[Tensor], own: list[Tensor], scale: float, step: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the sum of the KL divergence and its gradients for the last block's outputs; move the head if it is learned."""
    loss, gradients = torch.zeros((), dtype=torch.float64), []
    with task.open(task.blocks, True) if task.learns_head else nullcontext() as head:
        parameters = {} if head is None else _leaves(head)
        for output, indices in zip(outputs, own, strict=True):
            kl, gradient = task.backward(output, indices, parameters, scale)
            loss += kl.cpu()
            gradients.append(gradient)
        if head is not None:
            _move(task, settings, head, parameters, step)
    return loss, gradients


def _leaves(block: LearnedBlock) -> dict[str, Tensor]:
    """Return the block's parameters as the quantized model has them; those that are learned take gradients."""
    parameters = block.replacements()
    for name in block.learned:
        parameters[name].requires_grad_()
    return parameters


def _move(task: EndToEndTask, settings: EndToEndSettings, block: LearnedBlock, leaves: Mapping[str, Tensor], step: int) -> None:
    gradients = {}
    for name in block.learned:
        own = leaves[name].grad
        gradients[name] = task.total(torch.zeros_like(leaves[name]) if own is None else own)
    block.move(gradients, settings, step)


@torch.no_grad()
def _held_out(task: EndToEndTask, settings: EndToEndSettings, samples: Tensor) -> float:
    """Return the KL divergence per token on some samples."""
    own = [indices for indices in task.share(samples).split(settings.batch_size) if len(indices)]
    hidden = [task.inputs(indices) for indices in own]
    for place in range(task.blocks):
        hidden = _outputs(task, place, hidden, own)
    total = torch.zeros((), dtype=torch.float64)
    parameters = {}
    if task.learns_head:
        with task.open(task.blocks, False) as head:
            parameters = head.replacements()
    for state, indices in zip(hidden, own, strict=True):
        total += task.measure(state, indices, parameters).cpu()
    return task.total(total).item() / (len(samples) * task.tokens)
