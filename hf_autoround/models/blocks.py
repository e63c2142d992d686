# SPDX-License-Identifier: Apache-2.0
"""The parts of a model: decoder blocks, head, everything else; and the quantizable weights in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_autoround.errors import UnsupportedLayer
from hf_autoround.layers.sites import WeightSite
from hf_autoround.models.experts import expert_sites, fused_experts


@dataclass(frozen=True)
class ModelParts:
    """Where things are: `blocks` is the path of the list of blocks, `block_names` the blocks in order."""

    blocks: str
    block_names: tuple[str, ...]
    head: str | None

    def block_of(self, name: str) -> int | None:
        """Return the index of the block that a module or parameter lies in."""
        rest = name.removeprefix(f"{self.blocks}.")
        return int(rest.partition(".")[0]) if rest != name and rest.partition(".")[0].isdigit() else None


def model_parts(model: PreTrainedModel) -> ModelParts:
    """Find the decoder blocks: the longest list of modules that hold a Linear or fused experts, in the decoder if one is there
    (towers for images and sounds may have longer ones).

    Raises UnsupportedLayer if there is none, or if blocks share weights (they could not be replaced one by one).
    """
    experts = tuple(name for name, _ in fused_experts(model))
    candidates: list[tuple[int, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not name.startswith(tuple(f"{e}." for e in experts)):
            if all(any(isinstance(part, nn.Linear | Conv1D) for part in child.modules()) for child in module):
                candidates.append((len(module), name))
    outermost = [(size, name) for size, name in candidates if not any(name.startswith(f"{other}.") for _, other in candidates)]
    if not outermost:
        raise UnsupportedLayer(f"{type(model).__name__} has no list of decoder blocks, so it cannot be quantized block by block")
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    blocks = max([found for found in outermost if found[1].startswith(f"{path}.")] or outermost)[1]
    names = tuple(f"{blocks}.{index}" for index in range(len(model.get_submodule(blocks))))
    _refuse_shared_weights(model, names)
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None) if head is not None else None
    return ModelParts(blocks, names, head_name)


def find_sites(model: PreTrainedModel) -> list[WeightSite]:
    """Return every weight of the model that could be quantized: in Linear, Conv1D and fused experts, wherever it is."""
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites.append(WeightSite(name, f"{name}.weight", (module.out_features, module.in_features)))
        elif isinstance(module, Conv1D):
            columns, out = module.weight.shape
            sites.append(WeightSite(name, f"{name}.weight", (out, columns), transposed=True))
    return sites + list(expert_sites(model))


def other_matrices(model: PreTrainedModel, parts: ModelParts, sites: list[WeightSite]) -> Iterator[str]:
    """Yield the modules inside blocks that own a 2-D weight which is no site: routers, to be named as 16-bit."""
    known = {site.parameter for site in sites}
    for name, parameter in model.named_parameters():
        if parts.block_of(name) is not None and parameter.ndim == 2 and name.endswith(".weight") and name not in known:
            yield name.removesuffix(".weight")


def head_is_tied(model: PreTrainedModel, head: str) -> bool:
    """Say whether the output head shares its weight with the input embedding."""
    embeddings = model.get_input_embeddings()
    return embeddings is not None and model.get_submodule(head).weight is embeddings.weight


def _refuse_shared_weights(model: PreTrainedModel, blocks: tuple[str, ...]) -> None:
    owner: dict[int, str] = {}
    for block in blocks:
        for _, parameter in model.get_submodule(block).named_parameters():
            other = owner.setdefault(id(parameter), block)
            if other != block:
                raise UnsupportedLayer(
                    f"{type(model).__name__} cannot be quantized: {block} shares weights with {other}, "
                    "so the blocks cannot be replaced one by one"
                )
