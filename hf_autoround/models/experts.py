# SPDX-License-Identifier: Apache-2.0
"""Fused experts: one 3-D parameter in memory, one or two 2-D weights per expert in a checkpoint.

transformers merges the experts of a layer when it loads them; its converters say from which per-expert names. Where a
checkpoint is fused on disk too (gpt_oss), the expert's weight is called after the parameter.

Shapes: E experts, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from hf_autoround.layers.sites import WeightSite
from hf_autoround.models.loading import conversions


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for each module whose experts transformers computes from 3-D parameters, one at a time.

    They are the classes decorated with `use_experts_implementation`: their eager forward takes `parameter[expert]`, which
    is what makes them loadable packed. Other fused experts stay in 16 bits.
    """
    for name, module in model.named_modules():
        if getattr(module, "is_transposed", None) is not None and getattr(module, "has_gate", None) is not None:
            yield name, module


def expert_sites(model: PreTrainedModel) -> Iterator[WeightSite]:
    """Yield the sites of every fused expert parameter, by parameter, expert and row."""
    converters = [entry for entry in conversions(model) if isinstance(entry, WeightConverter)]
    for path, module in fused_experts(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 3:
                continue
            experts, *shape = parameter.shape
            out, columns = reversed(shape) if module.is_transposed else shape
            names_on_disk = _names_on_disk(f"{path}.{leaf}", converters)
            names = names_on_disk or [leaf]
            height = out // len(names)
            for expert in range(experts):
                for place, name in enumerate(names):
                    rows = (place * height, (place + 1) * height) if len(names) > 1 else None
                    site = f"{path}.{expert}.{name}"
                    yield WeightSite(
                        site, f"{path}.{leaf}", (height, columns), expert, rows, module.is_transposed, not names_on_disk
                    )


def _names_on_disk(parameter: str, converters: Iterable[WeightConverter]) -> list[str] | None:
    """Return the module names inside `experts.N.` that are merged into a parameter, in the order of their rows."""
    for converter in converters:
        merges = all(isinstance(operation, MergeModulelist | Concatenate) for operation in converter.operations)
        # `_original_*`: the patterns before transformers turns them into regular expressions
        targets, sources = converter._original_target_patterns, converter._original_source_patterns
        if merges and len(targets) == 1 and parameter.endswith(targets[0].lstrip(".^")):
            return [source.rpartition("*.")[2].removesuffix(".weight") for source in sources]
    return None
