"""AvgDist of masking strategies: how far hidden pixels are from visible ones (vision.md 7.2)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multiway.backbones.vit import whole_patches
from multiway.data.hide import hide_cells, hide_square
from multiway.data.order import generator
from multiway.diagnose.page import Ink, Report, facts, logarithmic, marked, number, paragraph, section, table, tiles
from multiway.errors import ConfigError
from multiway.metrics.avgdist import average_distance
from multiway.recipes.pictures import Hiding

BLOCKS = (4, 8, 16, 32, 64)
RATIOS = tuple(tenths / 10 for tenths in range(1, 10))
SWEET = (15.0, 20.0)
"""AvgDist in pixels that transfers best, as the authors of SimMIM say; a secondary source has 10 to 20."""
SWEET_PX = (192, 224)
"""Resolutions of pre-training at which it was found."""
CURVE_DRAWS = 40
"""Patterns behind every point of a curve."""
SHOWN = 5
"""Examples of each strategy."""

PUBLISHED = {
    "SimMIM": Hiding(scheme="cells", ratio=0.6, cell=32),
    "MAE": Hiding(scheme="patches", ratio=0.75),
    "BEiT": Hiding(scheme="blocks", ratio=0.4),
    "square": Hiding(scheme="square", ratio=0.6),
    "central square": Hiding(scheme="central square", ratio=0.6),
}
"""What a strategy is compared with; the squares are SimMIM's ablation."""

Hide = Callable[[np.random.Generator], np.ndarray]
"""Draws a pattern: bool (P,), True = hidden."""


class Found(NamedTuple):
    """AvgDist in pixels over many patterns, its standard deviation, and the share that is hidden."""

    mean: float
    std: float
    ratio: float


class Strategy(NamedTuple):
    """A strategy on the present grid, and what was found of it."""

    hiding: Hiding
    hide: Hide
    found: Found


def run(out: Path, *, hiding: Hiding, px: int = 192, patch: int = 16, draws: int = 200, seed: int = 0) -> Path:
    """Measure a strategy beside the published ones, and the curves over the ratio; returns the page's path.

    ``px``: side of pictures while pre-training; ``patch``: of the model, in pixels; ``draws``: patterns per strategy.
    Raises ConfigError for a strategy that this grid of patches does not allow.
    """
    grid = whole_patches(px, patch)
    if draws < 2:
        raise ConfigError(f"AvgDist is a mean over patterns with its spread: draw at least 2, got {draws}")
    if hiding.scheme == "cells" and hiding.cell > px:
        raise ConfigError(f"cells of {hiding.cell} pixels do not fit into pictures of {px}")
    report = Report(out)
    strategies = compare(hiding, grid, patch, draws, seed)
    cells: dict[str, list[Found | None]] = {
        f"{block} px": over_ratios(partial(hide_cells, (px, px), block), px, CURVE_DRAWS, seed)
        for block in BLOCKS
        if block <= px / 3
    }
    square = over_ratios(lambda ratio, rng: hide_square((px, px), ratio, True, rng), px, 1, seed)
    name, own = next(iter(strategies.items()))
    band = sweet(px)
    top = tiles(
        ("AvgDist of yours", f"{own.found.mean:.1f} <small>px</small>", f"at {px} px; {place(own.found.mean, band)}"),
        ("of a single pattern", f"± {own.found.std:.1f} <small>px</small>", f"standard deviation over {draws}"),
        ("hidden", f"{100 * own.found.ratio:.1f} <small>%</small>", f"{name}: {described(hiding)}"),
    )
    command = f"multiway diagnose hiding --px {px} --patch {patch} --ratio {hiding.ratio:g}"
    command += f" --scheme {shlex.quote(hiding.scheme)}"
    sections = (
        top,
        strategies_section(report, strategies, band, grid, seed),
        curves_section(report, cells, square, strategies, px),
        facts({
            "Command": command + f" --cell {hiding.cell}" * (hiding.scheme == "cells"),
            "Patterns": f"{draws} of every strategy, {CURVE_DRAWS} for every point of the curves; seed {seed}",
        }),
    )  # fmt: skip
    lead = (
        "AvgDist is the mean distance of a hidden pixel to the nearest visible one. Too small, and what is hidden can "
        "be copied from its neighbours; too large, and nothing nearby tells what it was. All figures in pixels, at "
        f"{px} px."
    )
    figures = {
        "px": px, "patch": patch, "sweet": band, "ratios": RATIOS, "cells": {k: _plain(v) for k, v in cells.items()},
        "central square": _plain(square),
        "strategies": {k: {"what": described(v.hiding), **v.found._asdict()} for k, v in strategies.items()},
    }  # fmt: skip
    summary = f"AvgDist of {described(hiding)} at {px} px: {own.found.mean:.1f} px, {place(own.found.mean, band)}"
    return report.finish("How far hidden pixels are from visible ones", lead, sections, figures, summary)


def _plain(points: Iterable[Found | None]) -> list[dict[str, float] | None]:
    return [own and own._asdict() for own in points]


def compare(hiding: Hiding, grid: tuple[int, int], patch: int, draws: int, seed: int) -> dict[str, Strategy]:
    """A strategy, first, and those published ones that differ from it and whose cells are whole patches."""
    px = min(grid) * patch
    named = [name for name, own in PUBLISHED.items() if own == hiding]
    listed = {f"yours, as {named[0]}" if named else "yours": hiding}
    listed |= {
        name: own
        for name, own in PUBLISHED.items()
        if own != hiding and (own.scheme != "cells" or (own.cell % patch == 0 and own.cell <= px / 3))
    }
    strategies = {}
    for name, own in listed.items():
        hide = own.of(grid, patch)
        found = measure(lambda rng, hide=hide: hide(rng).reshape(grid).repeat(patch, 0).repeat(patch, 1), draws, seed)
        if found is not None:
            strategies[name] = Strategy(own, hide, found)
        elif own == hiding:
            size = f"{grid[0]}x{grid[1]} patches of {patch} px"
            raise ConfigError(f"{described(hiding)}: of {size} all are hidden or none, AvgDist needs both")
    return strategies


def described(hiding: Hiding) -> str:
    """A strategy in words."""
    what = {
        "patches": "single patches", "cells": f"cells of {hiding.cell} px", "blocks": "blocks", "square": "one square",
        "central square": "one central square",
    }  # fmt: skip
    return f"{what[hiding.scheme]}, ratio {hiding.ratio:g}"


def measure(hide: Hide, draws: int, seed: int) -> Found | None:
    """AvgDist over many patterns of pixels, bool (H, W); None where one of them hides all or nothing."""
    patterns = [hide(generator(seed, "hiding", i)) for i in range(draws)]
    if any(own.all() or not own.any() for own in patterns):
        return None
    values = [average_distance(own) for own in patterns]
    return Found(float(np.mean(values)), float(np.std(values)), float(np.mean([own.mean() for own in patterns])))


def over_ratios(
    hide: Callable[[float, np.random.Generator], np.ndarray], px: int, draws: int, seed: int
) -> list[Found | None]:
    """`measure` at all RATIOS; ``hide``: ratio and generator -> pixels, flat."""
    return [measure(lambda rng, ratio=ratio: hide(ratio, rng).reshape(px, px), draws, seed) for ratio in RATIOS]


def sweet(px: int) -> tuple[float, float]:
    """The band of AvgDist that is said to transfer best; at other resolutions as the same share of the side."""
    if SWEET_PX[0] <= px <= SWEET_PX[1]:
        return SWEET
    return SWEET[0] * px / SWEET_PX[0], SWEET[1] * px / SWEET_PX[0]


def place(value: float, band: tuple[float, float]) -> str:
    """Where a value lies."""
    where = "below" if value < band[0] else "above" if value > band[1] else "within"
    return f"{where} {band[0]:.3g} to {band[1]:.3g} px"


# ------------------------------------------------------------------------------------------------------------ sections


def strategies_section(
    report: Report, strategies: Mapping[str, Strategy], band: tuple[float, float], grid: tuple[int, int], seed: int
) -> str:
    """Patterns of every strategy, and its figures."""

    def draw(figure: Any, ink: Ink) -> None:
        from matplotlib.colors import ListedColormap

        axes = figure.subplots(len(strategies), SHOWN + 1, width_ratios=[1.5] + [1] * SHOWN, squeeze=False)
        for row, (name, own) in zip(axes, strategies.items(), strict=True):
            row[0].axis("off")
            told = f"{name}\n{described(own.hiding)}\nAvgDist {own.found.mean:.1f} px"
            row[0].text(0, 0.5, told, va="center", ha="left", fontsize=9.5, linespacing=1.4)
            for i, axis in enumerate(row[1:]):
                pattern = own.hide(generator(seed, "hiding", i)).reshape(grid)
                colours = ListedColormap([ink.line, ink.series[0]])
                axis.imshow(pattern, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
                axis.spines[:].set_visible(False)

    rows = [
        [name, described(own.hiding), f"{100 * own.found.ratio:.1f} %", _cell(own.found, band), f"{own.found.std:.1f}"]
        for name, own in strategies.items()
    ]
    plot = report.plot(
        "patterns", draw, 1.45 * len(strategies), "examples of what each strategy hides",
        f"Blue: hidden. {grid[0]}x{grid[1]} patches.",
    )  # fmt: skip
    heads = ("strategy", "what is hidden", "hidden", "AvgDist, px", "± of one pattern, px")
    return section("strategies", "Strategies", plot, table(heads, rows))


def curves_section(
    report: Report,
    cells: Mapping[str, list[Found | None]],
    square: list[Found | None],
    strategies: Mapping[str, Strategy],
    px: int,
) -> str:
    """AvgDist against the ratio for every side of cells, and the table behind it."""
    band = sweet(px)

    def draw(figure: Any, ink: Ink) -> None:
        axes = figure.subplots()
        axes.axhspan(*band, color=ink.series[2], alpha=0.2, lw=0)
        axes.text(1.01, math.sqrt(band[0] * band[1]), f"{band[0]:.3g} to\n{band[1]:.3g} px", color=ink.series[2],
                  va="center", transform=axes.get_yaxis_transform())  # fmt: skip
        for colour, (name, points) in zip(ink.ordered(len(cells)), cells.items(), strict=True):
            values, spread = _columns(points)
            axes.fill_between(RATIOS, values - spread, values + spread, color=colour, alpha=0.16, lw=0)
            axes.plot(RATIOS, values, "o-", ms=4, color=colour)
            last = np.flatnonzero(np.isfinite(values))[-1]
            axes.annotate(name, (RATIOS[last], values[last]), xytext=(8, 0), textcoords="offset points", va="center",
                          color=colour)  # fmt: skip
        axes.plot(RATIOS, _columns(square)[0], ls="--", lw=1.3, color=ink.soft, label="one central square")
        for marker, (name, own) in zip("*soDv^", strategies.items(), strict=False):
            if not own.hiding.scheme.endswith("square"):
                axes.plot(own.found.ratio, own.found.mean, marker, ms=15 if marker == "*" else 7, mew=1.4, ls="",
                          mfc=ink.text if marker == "*" else ink.paper, mec=ink.text, zorder=5,
                          label=f"{name}: {described(own.hiding)}")  # fmt: skip
        axes.set(xlim=(0.05, 0.98), xticks=RATIOS, xlabel="share of cells that is hidden",
                 ylabel=f"AvgDist, pixels at {px} px", yscale="log")  # fmt: skip
        logarithmic(axes.yaxis)
        axes.legend(loc="upper left")

    known = (
        "which the authors of SimMIM found to transfer best (a secondary source says 10 to 20)"
        if band == SWEET
        else f"SimMIM’s 15 to 20 px at 192 px as a share of the side; that it holds at {px} px is an assumption"
    )
    plot = report.plot(
        "avgdist", draw, 5.2, "AvgDist against the share of cells that is hidden, a curve for every side of cells",
        f"Random cells by their side; shaded: standard deviation of one pattern. Band: {band[0]:.3g} to {band[1]:.3g} "
        f"px, {known}.",
    )  # fmt: skip
    rows = [[name, *(_cell(own, band) for own in points)] for name, points in cells.items()]
    rows.append(["one central square", *(_cell(own, band) for own in square)])
    note = (
        f"Mean AvgDist in pixels at {px} px, by side of the cells and share of them that is hidden (their number is "
        "rounded up). Green: within the band. –: nothing is left to see."
    )
    heads = ("side of cells", *(f"{ratio:.1f}" for ratio in RATIOS))
    return section("curves", "Block size and ratio", plot, paragraph(note), table(heads, rows))


def _columns(points: list[Found | None]) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of a curve, NaN where there are none."""
    mean, std, _ = np.array([own or (np.nan, np.nan, np.nan) for own in points]).T
    return mean, std


def _cell(own: Found | None, band: tuple[float, float]) -> str:
    if own is None:
        return "–"
    return marked(number(own.mean), "good") if band[0] <= own.mean <= band[1] else number(own.mean)
