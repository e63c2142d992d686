# SPDX-License-Identifier: Apache-2.0
"""The two chains of activations, float and quantized, as they pass through the blocks of a model, loaded one at a time.

Shapes: N samples (of this process' share), T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from hf_autoround.errors import CalibrationError, CheckpointError
from hf_autoround.layers.activations import input_quantizer
from hf_autoround.layers.fake_quantized_block import InputStatistics, watch_inputs
from hf_autoround.layers.sites import oriented
from hf_autoround.models.attention import use_chunked_attention
from hf_autoround.models.blocks import ModelParts
from hf_autoround.models.head import Head
from hf_autoround.models.loading import LazyModel, evict, load_keys
from hf_autoround.models.memory import release_memory
from hf_autoround.models.placement import Placement
from hf_autoround.models.processes import Processes
from hf_autoround.models.walk import BlockArguments, BlockRunner, capture, finish
from hf_autoround.numerics import data_type
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.streams.ranges import shared_ranges
from hf_autoround.streams.shards import refuse_not_finite
from hf_autoround.streams.shares import share_of
from hf_autoround.tuning import BlockResult, BlockTask, TunableWeight, teacher


@dataclass(frozen=True)
class StreamSettings:
    """How the blocks are walked: `nblocks` at a time, by which processes, on which devices, in which precision.

    `quantized_inputs`: each block is decided on what the quantized blocks before it produce. `keep_on_cpu`: activations
    wait in host memory. `amp`: matrix products in bfloat16 where the hardware has it. `sampled_rows`: how many inputs of
    each weight the algorithm asks for, in all batches.
    """

    nblocks: int = 1
    seed: int = 42
    placement: Placement = Placement(torch.device("cpu"))
    processes: Processes = Processes()
    quantized_inputs: bool = True
    keep_on_cpu: bool = False
    amp: bool = True
    sampled_rows: int = 0


@dataclass(frozen=True)
class PlannedModel:
    """What is walked: a model whose weights are in files, its parts, what becomes of its weights, and the samples (N, T)
    that pass through it, those of all processes."""

    lazy: LazyModel
    parts: ModelParts
    plan: QuantPlan
    tokens: Tensor


@dataclass(frozen=True)
class Unit:
    """Consecutive blocks that are quantized together (or the head): the key of the journal, and their names."""

    key: str
    names: tuple[str, ...]


def units(parts: ModelParts, plan: QuantPlan, nblocks: int) -> list[Unit]:
    """Return what is quantized together, in order; the head comes last if the plan has it."""
    names = parts.block_names
    cuts = range(0, len(names), nblocks)
    result = [Unit(f"block-{start:05d}", names[start : start + nblocks]) for start in cuts]
    if parts.head is not None and parts.head in plan.schemes:
        result.append(Unit("head", (parts.head,)))
    return result


class BlockWalk:
    """The two chains of activations, float and quantized, as they pass through the blocks."""

    def __init__(self, model: PlannedModel, batch_size: int, settings: StreamSettings, tunes: bool = True) -> None:
        lazy, parts, plan = model.lazy, model.parts, model.plan
        # where nothing is tuned on the quantized chain's inputs, nobody asks what the float model's outputs are
        self.chain_alone = settings.quantized_inputs and not tunes
        self.lazy, self.parts, self.plan, self.settings = lazy, parts, plan, settings
        self.processes, self.samples = settings.processes, len(model.tokens)
        self.share = share_of(self.samples, batch_size, self.processes)
        self.tokens = model.tokens[self.share.own]
        self.device = settings.placement.main
        self.parameters = plan.parameters()
        self.schemes = {name: scheme for name, (scheme, _) in self.parameters.items()}
        self.stored = lazy.checkpoint.entries[lazy.keys_under(parts.block_names[0])[0]].dtype
        self.dtype, self.autocast = compute_types(self.stored, self.device, settings.amp)
        if self.device.type == "cpu" and torch.bfloat16 in (self.dtype, self.autocast):
            use_chunked_attention(lazy.model)
        self.blocks = [lazy.model.get_submodule(name) for name in parts.block_names]

    def begin(self) -> None:
        """Capture the inputs of the first block."""
        with self.processes.together():
            self.load_outside()
            captured = capture(self.lazy.model, self.blocks, self.tokens, self.device)
            self.evict()
        self.returns_tuple = captured.returns_tuple
        self.arguments = dict(zip(self.parts.block_names, captured.arguments, strict=True))
        kept = torch.device("cpu") if self.settings.keep_on_cpu else self.device
        self.float_inputs = self.inputs = captured.hidden.to(kept)

    def resident(self, unit: Unit) -> Resident:
        """Load a unit for the duration of a `with`, and give the runner for it."""
        return Resident(self, unit)

    def runner(self, unit: Unit) -> BlockRunner:
        """Return the function that runs a unit; the head's inputs are the finished hidden states."""
        blocks = tuple(self.lazy.model.get_submodule(name) for name in unit.names)
        if unit.key == "head":
            self.load_outside()

            def finished(hidden: Tensor) -> Tensor:
                return finish(self.lazy.model, self.blocks, self.tokens, hidden, self.device, self.returns_tuple)

            inputs = finished(self.inputs)
            self.float_inputs = inputs if self.inputs is self.float_inputs else finished(self.float_inputs)
            self.inputs = inputs
            self.evict()
            return BlockRunner(unit.names, blocks, (BlockArguments.none(),), self.device, self.autocast)
        return BlockRunner(unit.names, blocks, tuple(self.arguments[name] for name in unit.names), self.device, self.autocast)

    def advance_float(self, runner: BlockRunner, watch: bool) -> InputStatistics:
        """Compute the float outputs, if there are to be any, and what the weights see on the quantized chain."""
        batches = -(-self.samples // self.share.batch_size)
        statistics = InputStatistics(kept=-(-self.settings.sampled_rows // batches))
        self.targets: Tensor | None = None
        if self.chain_alone:
            if watch:
                is_head = runner.names == (self.parts.head,)  # whose outputs are as wide as the vocabulary
                with self.processes.together():
                    self._watch(runner, statistics, lambda output: None if is_head else _refuse_damaged(runner, output))
            return statistics
        same = self.inputs is self.float_inputs
        with self.processes.together():
            if runner.names != (self.parts.head,):  # whose outputs are as wide as the vocabulary: computed when needed
                if watch and same:
                    outputs: list[Tensor] = []
                    self._watch(runner, statistics, lambda output: outputs.append(output.to(self.inputs)))
                    self.targets = torch.cat(outputs)
                else:
                    self.targets = runner.all(self.float_inputs, {}, self.share.batch_size)
                _refuse_damaged(runner, self.targets)
            if watch and not (same and self.targets is not None):
                self._watch(runner, statistics, lambda output: None)
        if self.targets is not None and not same and self.settings.quantized_inputs:
            self.float_inputs = self.targets  # not needed any more: give the memory back
        return statistics

    @torch.no_grad()
    def _watch(self, runner: BlockRunner, statistics: InputStatistics, take: Callable[[Tensor], None]) -> None:
        """Run the quantized chain's inputs through the unit; `take` gets the outputs, batch by batch. What the weights see
        in all processes' batches is added to `statistics` in the order of the samples."""
        weights = {name: (tensor, transposed) for name, tensor, transposed in self.weights(runner)}
        for indices in self.share.batches():
            seen = InputStatistics(kept=statistics.kept)
            if len(indices):
                with watch_inputs(weights, seen):
                    take(runner(self.inputs[indices], indices, {}))
            for each in self.processes.gather(seen if self.processes.count == 1 else seen.on_cpu()):
                statistics.add(each)

    def calibrated(self, runner: BlockRunner, statistics: InputStatistics) -> dict[str, Tensor]:
        """Return what calibration gives for the inputs of a unit's weights, ([E,] 1), where their schemes ask for it.

        Raises CalibrationError if no inputs were seen.
        """
        found = {}
        for name, _, _ in self.weights(runner):
            spec = self.schemes[name].activation
            if spec is not None and data_type(spec).calibrates_inputs(spec):
                if name not in statistics.largest:
                    raise CalibrationError(f"no inputs of {name} were seen, and {self.schemes[name].name} needs their range")
                largest = statistics.largest[name]
                unseen = largest.max().expand_as(largest)  # experts that saw no token get the range of the others
                found[name] = data_type(spec).input_scale(torch.where(largest > 0, largest, unseen), spec)
        return found

    def quantizing(self, runner: BlockRunner, static: Mapping[str, Tensor]) -> BlockRunner:
        """Return a runner that quantizes the inputs of what it replaces as the schemes say."""
        inputs = {
            name: (transposed, quantizer)
            for name, _, transposed in self.weights(runner)
            if (quantizer := input_quantizer(self.schemes[name], static.get(name))) is not None
        }
        return replace(runner, inputs=inputs)

    def task(self, place: int, runner: BlockRunner, statistics: InputStatistics, static: Mapping[str, Tensor]) -> BlockTask:
        """Return what the algorithm needs of a resident unit; `static` is what calibration gave."""
        inputs, float_inputs, targets, where = self.inputs, self.float_inputs, self.targets, self.share.place
        predicts = runner.names[-1] == self.parts.block_names[-1] and self.parts.head is not None
        end = cache(self.load_end)  # when it is first needed

        def error(indices: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
            """Return the mean squared error of the outputs; behind the last block, the KL divergence of the predictions."""
            own = where[indices]
            output = runner(inputs[own], own, replaced)
            if targets is not None:
                target = targets[own].to(self.device)
            else:
                with torch.no_grad():
                    target = runner(float_inputs[own], own, {})
            if predicts:
                head = end()
                mine, theirs = (head.finished(hidden, self.tokens[own]).flatten(0, 1) for hidden in (output, target))
                return teacher.error(teacher.Heads(head.logits, head.logits, head.linear), mine, theirs, head.rows)
            precise = torch.promote_types(output.dtype, torch.float32)
            return torch.nn.functional.mse_loss(output.to(precise), target.to(precise))

        weights = self.tunable({name: (tensor, transposed) for name, tensor, transposed in self.weights(runner)}, static)
        return BlockTask(
            seed=self.settings.seed * 1_000_003 + place,
            samples=self.samples,
            weights=weights,
            norms=self.norms(runner, weights),
            stored_dtype=self.stored,
            importance={
                name: squares.to(weights[name].parameter.device, torch.float32) for name, squares in statistics.squares.items()
            },
            inputs={name: statistics.inputs(name) for name in statistics.squares},
            error=None if self.chain_alone else error,
            share=self.share.of,
            total=self.processes.total,
        )

    def tunable(self, weights: Mapping[str, tuple[Tensor, bool]], static: Mapping[str, Tensor]) -> dict[str, TunableWeight]:
        """Return parameters (name -> tensor, transposed) as algorithms take them."""
        ranges = shared_ranges(self.plan, weights)
        return {
            name: TunableWeight(tensor, transposed, self.schemes[name], ranges.get(name), static.get(name))
            for name, (tensor, transposed) in weights.items()
        }

    @torch.no_grad()
    def advance_quantized(self, runner: BlockRunner, result: BlockResult) -> None:
        """Move both chains behind the block."""
        if self.settings.quantized_inputs:
            weights = {name: tensor.to(self.lazy.model.get_parameter(name)) for name, tensor in result.tuned.items()}
            for name, tensor, transposed in self.weights(runner):
                weights[name] = oriented(result.layers[name].weight(), transposed).to(tensor)
            self.inputs = runner.all(self.inputs, weights, self.share.batch_size)
            self.float_inputs = self.inputs if self.targets is None else self.targets
        else:
            assert self.targets is not None
            self.inputs = self.float_inputs = self.targets

    def weights(self, runner: BlockRunner) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield name, parameter and whether it lies transposed of what is quantized in a resident unit."""
        for name, (_, site) in self.parameters.items():
            if name.startswith(tuple(f"{block}." for block in runner.names)):
                yield name, self.lazy.model.get_parameter(name).detach(), site.transposed

    def norms(self, runner: BlockRunner, weights: Mapping[str, TunableWeight]) -> dict[str, Tensor]:
        """Return the 1-D parameters of norms, and the biases of layers that are quantized."""
        found = {}
        for block_name, block in zip(runner.names, runner.blocks, strict=True):
            for name, module in block.named_modules(prefix=block_name):
                is_norm = type(module).__name__.endswith("Norm")
                for leaf, parameter in module.named_parameters(prefix=name, recurse=False):
                    if parameter.ndim == 1 and (is_norm or (leaf.endswith(".bias") and f"{name}.weight" in weights)):
                        found[leaf] = parameter.detach()
        return found

    def load_end(self) -> Head:
        """Load what lies outside of the blocks, head included, and return what comes after the blocks."""
        self.load_outside()
        model, name = self.lazy.model, self.parts.head
        if name is not None:
            load_keys(self.lazy, self.lazy.keys_under(name), self.device, self.dtype)
        weights = {
            parameter: tensor.detach().to(self.autocast or self.dtype)
            for parameter, tensor in model.named_parameters(remove_duplicate=False)
            if name is not None and parameter.startswith(f"{name}.")
        }
        return Head(model, self.blocks, self.device, self.autocast, self.returns_tuple, weights)

    def load_outside(self) -> None:
        """Load what lies outside of the blocks and the head."""
        inside = tuple(f"{name}." for name in (*self.parts.block_names, *([self.parts.head] if self.parts.head else [])))
        keys = [key for key, name in self.lazy.keys.items() if not name.startswith(inside)]
        load_keys(self.lazy, keys, self.device, self.dtype)
        for name, tensor in self.lazy.model.named_parameters():
            if tensor.device.type == "meta" and not name.startswith(inside):
                raise CheckpointError(f"{self.lazy.name} holds no tensor for {name}")

    def evict(self) -> None:
        """Drop the parameters of all that is loaded."""
        evict(self.lazy.model)
        self.lazy.model.tie_weights()
        release_memory()


class Resident:
    """A unit that is loaded, and evicted when the `with` ends."""

    def __init__(self, walk: BlockWalk, unit: Unit) -> None:
        self.walk, self.unit = walk, unit

    def __enter__(self) -> BlockRunner:
        walk, lazy = self.walk, self.walk.lazy
        with walk.processes.together():
            runner = walk.runner(self.unit)
            for name, block in zip(runner.names, runner.blocks, strict=True):
                load_keys(lazy, lazy.keys_under(name), walk.device, walk.dtype)
                for parameter, tensor in block.named_parameters(prefix=name):
                    if tensor.device.type == "meta":
                        raise CheckpointError(f"{lazy.name} holds no tensor for {parameter}")
                    refuse_not_finite(parameter, tensor)
                walk.settings.placement.spread(name, block)
        self.blocks = runner.blocks
        return runner

    def __exit__(self, *error: object) -> None:
        for block in self.blocks:
            self.walk.settings.placement.gather(block)
        self.walk.evict()


def compute_types(stored: torch.dtype, device: torch.device, amp: bool) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the dtype to load blocks in, and the one to autocast matrix products to (None: no autocast).

    bfloat16 models are computed as they are, where the hardware multiplies bfloat16, and so are float64 models, which ask
    for precision; everything else is loaded in float32 (float16 activations overflow) with products in bfloat16.
    """
    if stored == torch.float64:
        return torch.float64, None
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not amp or not fast:
        return torch.float32, None
    return (torch.bfloat16, None) if stored == torch.bfloat16 else (torch.float32, torch.bfloat16)


def _refuse_damaged(runner: BlockRunner, outputs: Tensor) -> None:
    if not torch.isfinite(outputs).all():
        raise CalibrationError(
            f"the outputs of {runner.names[-1]} hold NaN or infinity before it is quantized; the model's weights are damaged, or "
            "bfloat16 overflows: try disable_amp"
        )
