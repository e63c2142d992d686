# SPDX-License-Identifier: Apache-2.0
"""The model card of a quantized checkpoint: how it was made, how far each block is from the float model, how to load it.

Nothing in it depends on time, paths of a machine or on how often a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_autoround import __version__
from hf_autoround.planning.plan import QuantPlan

_USE = """```python
import hf_autoround  # teaches transformers to load it
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


def model_card(
    source: str,
    plan: QuantPlan,
    recipe: Mapping[str, Any],
    data: str | None,
    records: Sequence[Mapping[str, Any]],
    errors: Mapping[str, float],
    packed: bool,
    plot: str | None = None,
) -> str:
    """Return README.md. `records` are log entries, `errors` each layer's relative error, `data` says what the blocks were
    calibrated on, `plot` is the file beside it with the curves of tuning end to end."""
    name = Path(source).name
    metadata = ModelCardData(
        base_model=source if _on_hub(source) else None,
        base_model_relation="quantized" if _on_hub(source) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["auto-round", "hf_autoround", plan.scheme.name.lower(), "quantized"],
    )
    lines = [
        f"# {name}, {plan.scheme.name}",
        "",
        f"Quantized with hf_autoround {__version__}: {len(plan.sites)} weights, {_counts(plan)}.",
        "",
        "| | |",
        "|---|---|",
        f"| scheme | {plan.scheme.name} |",
        *(f"| {key} | {value} |" for key, value in recipe.items()),
        f"| calibration | {data or 'none: rounded to nearest'} |",
        f"| left in 16 bits | {_kept(plan)} |",
        "",
        *([_USE, ""] if packed else []),
        *_block_errors(records),
        *_end_to_end(records, plot),
        *_layer_errors(errors),
    ]
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n"))


def _layer_errors(errors: Mapping[str, float]) -> list[str]:
    """Return a line for each kind of layer: its last name, over all blocks."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.rpartition(".")[2], []).append((error, name))
    rows = [
        f"| {kind} | {len(found)} | {min(found)[0]:.4f} | {sum(error for error, _ in found) / len(found):.4f} "
        f"| {max(found)[0]:.4f} | {max(found)[1]} |"
        for kind, found in kinds.items()
    ]
    head = "How far weights are from their float values (norm of the difference over their norm):"
    table = ["| layer | number | least | mean | most | which |", "|---|---|---|---|---|---|"]
    return ["", head, "", *table, *rows] if rows else []


def _block_errors(records: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [record for record in records if record.get("loss_first") is not None]
    if not rows:
        return []
    return [
        "Mean squared error of each block's output (of the last one: KL divergence of the predictions) before and after tuning:",
        "",
        "| block | layers | before | after | best step |",
        "|---|---|---|---|---|",
        *(
            f"| {row['block']} | {row['layers']} | {row['loss_first']:.3e} | {row['loss_best']:.3e} | {row['best_step']} |"
            for row in rows
        ),
    ]


def _end_to_end(records: Sequence[Mapping[str, Any]], plot: str | None) -> list[str]:
    rows = [record for record in records if "held_out_kl" in record]
    if not rows:
        return []
    best = next(row for row in reversed(rows) if row["end_to_end_step"] == rows[-1]["best_step"])
    return [
        "",
        f"All blocks were then tuned together towards the float model's predictions. KL divergence to them per token, on "
        f"samples that were held out: {rows[0]['held_out_kl']:.4f} before, {best['held_out_kl']:.4f} after step "
        f"{best['end_to_end_step']}, the one that was kept.",
        *(["", f"![KL divergence over steps]({plot})"] if plot else []),
    ]


def _counts(plan: QuantPlan) -> str:
    counts: dict[str, int] = {}
    for scheme in plan.schemes.values():
        counts[scheme.name] = counts.get(scheme.name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _kept(plan: QuantPlan) -> str:
    names = sorted(plan.kept)
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return (shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing inside the blocks"


def _on_hub(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and not Path(source).exists()
