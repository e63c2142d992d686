# SPDX-License-Identifier: Apache-2.0
"""A picture of tuning end to end: KL divergence to the float model over steps, held out and in training.

Written as SVG by hand: a plotting package takes seconds to import, a tenth of a small model's whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, inf, log10
from pathlib import Path
from typing import Any

NAME = "end_to_end.svg"
WIDTH, HEIGHT = 700, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 680, 20, 350  # the axes
HELD_OUT, TRAINING = "#1f77b4", "#ff7f0e"
Point = tuple[float, float]


def plot_divergence(records: Sequence[Mapping[str, Any]], folder: Path) -> str | None:
    """Draw the curves of a run's log into `folder` and return the file's name; None if there is nothing to draw."""
    measured = [record for record in records if "held_out_kl" in record]
    if not measured:
        return None
    held_out, training = (
        [(row["end_to_end_step"], row[key]) for row in measured if 0 < row.get(key, 0) < inf]  # where a logarithm has a place
        for key in ("held_out_kl", "training_kl")
    )
    steps = max(measured[-1]["end_to_end_step"], 1)
    (folder / NAME).write_text(_drawn(held_out, training, steps, measured[-1]["best_step"]), encoding="utf-8")
    return NAME


def _drawn(held_out: Sequence[Point], training: Sequence[Point], steps: int, best: int) -> str:
    values = [value for _, value in (*held_out, *training)] or [1.0]
    low, high = log10(min(values)) - 0.03, log10(max(values)) + 0.03

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / steps

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (log10(value) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="black"/>',
        *(_text(x(step), BOTTOM + 18, f"{step:g}") for step in _step_ticks(steps)),
        *(_text(LEFT - 6, y(value) + 4, f"{value:g}", "end") for value in _value_ticks(low, high)),
        _text((LEFT + RIGHT) / 2, HEIGHT - 12, "step"),
        f'<g transform="translate(14 {(TOP + BOTTOM) / 2}) rotate(-90)">{_text(0, 0, "KL(float || quantized) per token")}</g>',
        f'<path d="M{x(best):.1f} {TOP}V{BOTTOM}" stroke="grey"/>',
        *_curve(held_out, x, y, HELD_OUT, ""),
        *_curve(training, x, y, TRAINING, ' stroke-dasharray="6 4"'),
    ]
    for line, (name, color) in enumerate((("held out", HELD_OUT), ("in training", TRAINING), ("kept", "grey"))):
        parts.append(f'<g fill="{color}">{_text(RIGHT - 10, TOP + 16 + 18 * line, name, "end")}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _curve(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float], color: str, dash: str) -> list[str]:
    """Return a line with a dot at each of the points."""
    places = [(x(step), y(value)) for step, value in points]
    line = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    dots = [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{color}"/>' for across, down in places]
    return [f'<polyline points="{line}" fill="none" stroke="{color}"{dash}/>', *dots]


def _text(across: float, down: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}">{text}</text>'


def _step_ticks(steps: float) -> list[float]:
    """Return some five round numbers from 0 to `steps`."""
    size = 10.0 ** floor(log10(steps / 4))
    apart = max(factor * size for factor in (1, 2, 5) if factor * size <= steps / 4)
    return [apart * number for number in range(floor(steps / apart) + 1)]


def _value_ticks(low: float, high: float) -> list[float]:
    """Return the round numbers between two powers of ten, every digit if they are near to each other."""
    digits = range(1, 10) if high - low < 1 else (1, 2, 5)
    every = [digit * 10.0**power for power in range(floor(low), ceil(high) + 1) for digit in digits]
    return [value for value in every if low <= log10(value) <= high]
