# SPDX-License-Identifier: Apache-2.0
"""The walk over the blocks of a model: what reaches each of them, and how each is run.

Capture is one pass of the model's own forward with every block replaced by the identity, so no block's weights are
needed: it yields the inputs of the first block and *every* block's own arguments (masks and rotary tables differ between
sliding and full attention). Arguments that are the same for all samples are kept once.

Shapes: N samples, B samples of a batch, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from hf_autoround.errors import UnsupportedLayer
from hf_autoround.layers.activations import InputQuantizer, quantized_inputs
from hf_autoround.layers.fake_quantized_block import run_block
from hf_autoround.layers.products import PadRows


@dataclass
class BlockArguments:
    """What one block is called with besides its hidden states: leaves of a tree, some of them with a row per sample."""

    spec: Any = None
    leaves: list[Any] = field(default_factory=list)
    varying: dict[int, list[Tensor]] = field(default_factory=dict)
    count: int = 0

    @classmethod
    def none(cls) -> BlockArguments:
        """Return the arguments of a module that takes hidden states alone."""
        return cls(spec=pytree.tree_structure(((), {})))

    def add(self, args: tuple, kwargs: dict[str, Any], seen: dict[tuple[int, int], bool]) -> None:
        """Take in one sample's arguments; `seen` remembers comparisons, as blocks share most tensors."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.spec is None:
            self.spec, self.leaves, self.count = spec, leaves, 1
            return
        for place, (first, leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            if place in self.varying:
                self.varying[place].append(leaf)
            elif isinstance(leaf, Tensor):
                pair = (id(first), id(leaf))
                if pair not in seen:
                    seen[pair] = first.shape == leaf.shape and torch.equal(first, leaf)
                if not seen[pair]:
                    self.varying[place] = [first] * self.count + [leaf]
        self.count += 1

    def at(self, indices: Tensor, device: torch.device) -> tuple[tuple, dict[str, Any]]:
        """Return (args, kwargs) for these samples (B,)."""
        leaves = list(self.leaves)
        for place, tensors in self.varying.items():
            leaves[place] = torch.cat([tensors[index] for index in indices.tolist()])
        moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(moved, self.spec)


@dataclass(frozen=True)
class Captured:
    """The inputs of the first block, (N, T, H), every block's own arguments, and whether blocks return a tuple."""

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]
    returns_tuple: bool


@dataclass(frozen=True)
class BlockRunner:
    """Consecutive blocks (usually one), with their own arguments, as one function of hidden states and weights.

    `inputs` says, by full parameter name, whether a weight lies transposed and how its inputs are quantized.
    """

    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    arguments: tuple[BlockArguments, ...]
    device: torch.device
    autocast: torch.dtype | None = None
    inputs: Mapping[str, tuple[bool, InputQuantizer]] = field(default_factory=dict)

    def __call__(self, hidden: Tensor, indices: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the hidden states after the blocks for samples `indices` (B,); `weights` go by full parameter name, and
        the inputs of those among them are quantized."""
        hidden = hidden.to(self.device)
        with autocast(self.device, self.autocast):
            for name, block, arguments in zip(self.names, self.blocks, self.arguments, strict=True):
                args, kwargs = arguments.at(indices, self.device)
                own = {key.removeprefix(f"{name}."): weights[key] for key in weights if key.startswith(f"{name}.")}
                quantized = {key: (own[key], *how) for key, how in self._inputs_of(name, own)}
                # quantizers are entered last, so they see inputs before rows are added; whoever only watches gives no weights
                with PadRows() if self._compiles_kernels(hidden, own) else nullcontext(), quantized_inputs(quantized):
                    hidden = run_block(block, hidden, args, kwargs, own)
        return hidden

    def _compiles_kernels(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> bool:
        """Say whether these are experts whose products a CPU's library compiles a kernel for."""
        in_bfloat16 = torch.bfloat16 in (hidden.dtype, self.autocast)
        return hidden.device.type == "cpu" and in_bfloat16 and any(weight.ndim == 3 for weight in weights.values())

    def _inputs_of(self, block: str, own: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[bool, InputQuantizer]]]:
        """Yield the name inside a block, and how its inputs are quantized, of each of these weights that has such."""
        for name, how in self.inputs.items():
            if name.startswith(f"{block}.") and (inside := name.removeprefix(f"{block}.")) in own:
                yield inside, how

    @torch.no_grad()
    def all(self, hidden: Tensor, weights: Mapping[str, Tensor], batch_size: int) -> Tensor:
        """Return the hidden states (N, T, H) after the blocks for all samples, on the device where `hidden` is kept."""
        outputs = []
        for indices in torch.arange(len(hidden)).split(batch_size):
            outputs.append(self(hidden[indices], indices, weights).to(device=hidden.device, dtype=hidden.dtype))
        return torch.cat(outputs)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Compute matrix products in `dtype`, or leave everything as it is."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


@torch.no_grad()
def capture(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, device: torch.device) -> Captured:
    """Run the model on each row of tokens (N, T) and record what reaches its blocks.

    Everything outside of the blocks (embeddings, norms) must be loaded; the blocks need no weights.
    Raises UnsupportedLayer if the model does not call each block once, in order, on (1, T, H) hidden states.
    """
    try:
        return _capture(model, blocks, tokens, device, returns_tuple=False)
    except _TakesFirst:  # some models go on with the first element of what a block returns
        return _capture(model, blocks, tokens, device, returns_tuple=True)


def _capture(
    model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, device: torch.device, returns_tuple: bool
) -> Captured:
    arguments = tuple(BlockArguments() for _ in blocks)
    firsts: list[Tensor] = []

    def record(place: int, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if place == 0:
            if hidden.ndim != 3 or hidden.shape[:2] != (1, tokens.shape[1]):
                raise UnsupportedLayer(
                    f"{type(model).__name__} cannot be quantized block by block: its blocks take hidden states of shape "
                    f"{tuple(hidden.shape)}, not (batch, tokens, hidden)"
                )
            firsts.append(hidden)
        elif hidden.shape != firsts[-1].shape:
            raise _TakesFirst
        arguments[place].add(args, kwargs, seen)
        return hidden

    for row in tokens:
        seen: dict[tuple[int, int], bool] = {}
        walk_through(model, blocks, row[None].to(device), record, returns_tuple)
    return Captured(torch.cat(firsts), arguments, returns_tuple)


@torch.no_grad()
def finish(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    tokens: Tensor,
    hidden: Tensor,
    device: torch.device,
    returns_tuple: bool = False,
) -> Tensor:
    """Return what the head receives, (N, T, H), for hidden states (N, T, H) that have been through all blocks."""
    outputs = []
    for row, finished in zip(tokens, hidden, strict=True):
        result = walk_through(
            model,
            blocks,
            row[None].to(device),
            lambda place, state, args, kwargs: finished[None].to(device) if place == len(blocks) - 1 else state,  # noqa: B023
            returns_tuple,
        )
        outputs.append(result.last_hidden_state.to(device=hidden.device, dtype=hidden.dtype))
    return torch.cat(outputs)


class _TakesFirst(Exception):
    """The model took the first element of what a block returned."""


def walk_through(model: PreTrainedModel, blocks: Sequence[nn.Module], row: Tensor, visit: Any, returns_tuple: bool) -> Any:
    """Run the model without its head, calling `visit(place, hidden, args, kwargs)` in place of each block."""
    visited: list[int] = []

    def visitor(place: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            visited.append(place)
            output = visit(place, hidden, args, kwargs)
            return (output,) if returns_tuple else output

        return forward

    with replaced(blocks, visitor):
        output = model.base_model(input_ids=row, use_cache=False)
    if visited != list(range(len(blocks))):
        raise UnsupportedLayer(
            f"{type(model).__name__} cannot be quantized block by block: "
            f"it does not call its {len(blocks)} blocks once each, in order"
        )
    return output


@contextmanager
def replaced(blocks: Sequence[nn.Module], visitor: Any) -> Iterator[None]:
    """Give each module the forward `visitor(place)` for the duration of a `with`."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for place, block in enumerate(blocks):
            block.forward = visitor(place)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
