"""Ticks: which values of an axis have one, and which of their labels there is room for."""

import math
from collections.abc import Sequence
from typing import Any

STEPS = (1, 2, 4, 5, 10, 20, 50, 100, 200, 500, 1000)


def step(axis: Any, pixels: float, room: float) -> None:
    """Put ticks at whole numbers, as many as there is room for."""
    span = abs(axis.range[1] - axis.range[0])
    step = next((s for s in STEPS if pixels * s / span >= room), STEPS[-1])
    axis.update(tickmode="linear", tick0=0, dtick=step, tickangle=0)


def all_numbers(labels: Sequence[str]) -> bool:
    """Whether all labels are numbers, of which some may be left out."""
    return all(t[:1].isdigit() for t in labels)


def pixels(axis: Any, places: Sequence[Any], wide: float) -> list[float]:
    """Return where these values lie along an axis of this width."""
    if isinstance(places[0], str):
        return [(k + 0.5) * wide / len(places) for k in range(len(places))]
    at = [math.log10(p) if axis.type == "log" else float(p) for p in places]
    low, high = axis.range or (min(at) - 0.06 * (max(at) - min(at)), max(at) + 0.06 * (max(at) - min(at)))
    return [(a - low) / ((high - low) or 1) * wide for a in at]


def apart(at: Sequence[float], widths: Sequence[float]) -> list[int]:
    """Return the indices of labels that do not overlap; the last one is always kept."""
    kept: list[int] = []
    for k in sorted(range(len(at)), key=lambda k: -at[k]):
        if not kept or at[kept[-1]] - at[k] >= (widths[k] + widths[kept[-1]]) / 2:
            kept.append(k)
    return kept[::-1]
