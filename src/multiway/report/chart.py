"""Curves as SVG, drawn by hand: small, the same bytes for the same numbers, and coloured by the page they stand in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 22
POINTS = 400
"""Most points of a line; more cannot be told apart."""

SMOOTHING = 40
"""The smoothed line is the mean over this share of all steps: one part in so many."""


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Running mean over a window around every value, cut short at both ends: float64 (N,)."""
    half = len(values) // SMOOTHING // 2
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    rough = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def curve(steps: Sequence[int], values: Sequence[float], level: float | None = None) -> str:
    """One quantity over the steps as an SVG element, smoothed over raw; ``level``: a dashed line at this height.

    Values that are not finite are left out.
    """
    known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not known:
        return "<p>no finite value</p>"
    x, y = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
    soft = smooth(y)
    low, high = _range([*np.percentile(y, (1, 99)), *soft, *([] if level is None else [level])])
    last = max(float(x[-1]), 1.0)

    def across(step: np.ndarray | float) -> np.ndarray | float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def down(value: np.ndarray | float) -> np.ndarray | float:
        return TOP + (high - np.clip(value, low, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{y[0]:.2f} to {soft[-1]:.2f}">']
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {down(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step, anchor in ((0, "start"), (last, "end")):
        parts.append(f'<text x="{across(step):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{step:,.0f}</text>')
    parts.append(f'<text x="{across(last / 2):.1f}" y="{HEIGHT - 5}" text-anchor="middle">steps</text>')
    if level is not None:
        parts.append(f'<path class="level" d="M{LEFT} {down(level):.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<path class="raw" d="{_line(across(x), down(y))}"/>')
    parts.append(f'<path class="smooth" d="{_line(across(x), down(soft))}"/></svg>')
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What the picture shows: all values with a little room."""
    low, high = float(np.min(values)), float(np.max(values))
    room = max(0.05 * (high - low), 1e-3)
    return (0.0 if 0 <= low < 0.25 * high else low - room), high + room


def _line(x: np.ndarray | float, y: np.ndarray | float) -> str:
    places = np.stack([x, y], axis=1)
    thin = places[:: max(1, math.ceil(len(places) / POINTS))]
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in [*thin, places[-1]])
