# SPDX-License-Identifier: Apache-2.0
"""A picture of tuning end to end: KL divergence to the float model over steps, held out and in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)
NAME = "end_to_end.png"


def plot_divergence(records: Sequence[Mapping[str, Any]], folder: Path) -> str | None:
    """Draw the curves of a run's log into `folder` and return the file's name; None if there is nothing to draw."""
    measured = [record for record in records if "held_out_kl" in record]
    if not measured:
        return None
    if find_spec("matplotlib") is None:
        logger.info(f"{NAME} is not drawn: matplotlib is missing; pip install 'hf-autoround[plot]'")
        return None
    from matplotlib.figure import Figure  # draws to a file without a display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["end_to_end_step"] for row in measured], [row["held_out_kl"] for row in measured], "o-", label="held out")
    trained = [row for row in measured if "training_kl" in row]
    axes.plot([row["end_to_end_step"] for row in trained], [row["training_kl"] for row in trained], ".--", label="in training")
    axes.axvline(measured[-1]["best_step"], color="grey", linewidth=0.8, label="kept")
    axes.set(xlabel="step", ylabel="KL(float || quantized) per token", yscale="log")
    axes.legend()
    figure.savefig(folder / NAME, dpi=120)
    return NAME
