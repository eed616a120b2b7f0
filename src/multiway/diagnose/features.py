"""What blocks make of pictures: how alike layers are (CKA), and how far activations spread (vision.md 10)."""

from __future__ import annotations

import copy
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multiway.diagnose.inputs import BATCH, RANDOM, Pictures, open_models, open_pictures
from multiway.diagnose.page import Ink, Report, facts, from_zero, logarithmic, number, paragraph, section, table, tiles
from multiway.errors import ConfigError
from multiway.metrics.cka import FEWEST, cka, gram, hsic
from multiway.pretrained import Pretrained

TICKS = 26
"""Labels on an axis of the map at most."""
LOGARITHMIC = 5
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

Found = Mapping[str, Mapping[str, list[float]]]
"""By model: ``std`` of every layer, and of a trained one ``std at first``."""


@dataclass
class Spread:
    """Sum, sum of squares and number of a block's activations."""

    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Add a batch."""
        x = x.double()
        self.total += float(x.sum())
        self.squares += float(x.square().sum())
        self.count += x.numel()

    @property
    def std(self) -> float:
        """Standard deviation over tokens, channels and pictures."""
        mean = self.total / self.count
        return max(0.0, self.squares / self.count - mean**2) ** 0.5


def run(
    out: Path, models: Sequence[str], *, data: str | None = None, split: str | None = None, count: int = 128
) -> Path:
    """Measure one model, or two on the same pictures; returns the page's path.

    ``models``, ``data``, ``split``, ``count``: as `multiway.diagnose.attention.run` takes them. Raises ConfigError for
    fewer pictures than debiased CKA needs.
    """
    report = Report(out)
    opened, pictures = open_models(models), open_pictures(data, split, count)
    if len(pictures) < FEWEST:
        raise ConfigError(f"{pictures.origin} has {len(pictures)} pictures, debiased CKA needs at least {FEWEST}")
    similar, spread = measure(opened, pictures)
    found = {model.name: {"std": own} for model, own in zip(opened, spread, strict=True)}
    for model in opened:
        if not model.name.endswith(RANDOM):
            found[model.name]["std at first"] = at_first(model, pictures)
    sections = (
        tiles(*(tile for name, own in found.items() for tile in growth(name, own, len(found) > 1))),
        cka_section(report, similar, found, len(pictures)),
        spread_section(report, found),
        facts({
            "Models": ", ".join(found), "Pictures": f"{len(pictures)} from {pictures.origin}, evenly spread",
            "CKA": f"linear, debiased (HSIC of Song et al. 2012), all tokens of a picture as its features, {BATCH} "
                   "pictures at a time",
            "Layer 0": "what the first block reads",
        }),
    )  # fmt: skip
    lead = (
        f"Activations behind every block of {escape(' and '.join(found))} on {len(pictures)} pictures: which layers "
        "represent them alike, and how the spread of activations grows with depth."
    )
    figures = {"pictures": len(pictures), "data": pictures.origin, "cka": similar, "models": found}
    summary = "standard deviation of activations, first to last block: " + "; ".join(
        f"{name} {own['std'][1]:.2f} to {own['std'][-1]:.2f}" for name, own in found.items()
    )
    return report.finish("What blocks make of pictures", lead, sections, figures, summary)


# ----------------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def measure(models: Sequence[Pretrained], pictures: Pictures) -> tuple[np.ndarray, list[list[float]]]:
    """CKA of all layers of all models, (L, L), and the standard deviation of every layer of every model."""
    spread: list[dict[int, Spread]] = [defaultdict(Spread) for _ in models]
    total, seen = torch.zeros((), dtype=torch.float64), 0
    for images in pictures.batches(models):
        if len(images[0]) < FEWEST:  # the rest of the pictures, too few for an estimate
            break
        grams: list[Tensor] = []

        def look(i: int, layer: int, x: Tensor, grams: list[Tensor] = grams) -> None:
            spread[i][layer].add(x)
            grams.append(gram(x).cpu())

        for i, model in enumerate(models):
            through_layers(model.model, images[i], partial(look, i))
        total = total + hsic(torch.stack(grams)) * len(images[0])
        seen += len(images[0])
    return cka(total / seen).numpy(), [[own.std for own in layers.values()] for layers in spread]


@torch.inference_mode()
def at_first(model: Pretrained, pictures: Pictures) -> list[float]:
    """The standard deviation of every layer before any training: initialised anew, over one batch of pictures."""
    blank: Any = copy.deepcopy(model.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank.init_weights()
    spread: dict[int, Spread] = defaultdict(Spread)
    [images] = next(pictures.batches([model]))
    through_layers(blank, images, lambda layer, x: spread[layer].add(x))
    return [own.std for own in spread.values()]


def through_layers(model: Any, images: Tensor, look: Callable[[int, Tensor], None]) -> None:
    """Encode pictures; ``look`` is shown what the first block reads (layer 0) and what every block returns, flattened
    to (B, F).
    """

    def show(layer: int, x: Tensor) -> None:
        look(layer, x.reshape(len(images), -1))

    blocks = list(model.encoder.blocks)
    hooks = [blocks[0].register_forward_pre_hook(lambda block, inputs: show(0, inputs[0]))]
    for layer, block in enumerate(blocks, 1):
        hooks.append(block.register_forward_hook(lambda block, inputs, x, layer=layer: show(layer, x)))
    try:
        model.encode(image=images)
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------------------ sections


def growth(name: str, own: Mapping[str, list[float]], several: bool) -> list[tuple[str, str, str]]:
    """Tiles of how the spread grows."""
    std, first = own["std"], own.get("std at first")
    title = f"{escape(name)}: activations" if several else "activations"
    note = f"standard deviation, block 1 to {len(std) - 1}"
    if first:
        note += f"; before any training {number(first[1])} to {number(first[-1])}"
    return [(title, f"{number(std[1])} to {number(std[-1])}", note)]


def cka_section(report: Report, similar: np.ndarray, found: Found, pictures: int) -> str:
    """The map of all pairs of layers."""
    edges = np.cumsum([0, *(len(own["std"]) for own in found.values())])
    labels = [str(layer) for own in found.values() for layer in range(len(own["std"]))]

    def draw(figure: Any, ink: Ink) -> None:
        axes = figure.subplots()
        shown = axes.imshow(similar, vmin=0, vmax=1, cmap=ink.ramp, origin="lower", interpolation="nearest")
        every = range(0, len(labels), -(-len(labels) // TICKS))
        axes.set_xticks(every, [labels[i] for i in every])
        axes.set_yticks(every, [labels[i] for i in every])
        axes.grid(False)
        axes.set(xlabel="layer", ylabel="layer")
        for edge in edges[1:-1]:
            axes.axhline(edge - 0.5, color=ink.paper, lw=3)
            axes.axvline(edge - 0.5, color=ink.paper, lw=3)
        if len(found) > 1:
            for name, begin, end in zip(found, edges, edges[1:], strict=False):
                told = textwrap.fill(name, 32, break_long_words=True)
                axes.text((begin + end - 1) / 2, len(labels) - 0.2, told, ha="center", va="bottom", fontsize=8)
        bar = figure.colorbar(shown, ax=axes, shrink=0.7, label="CKA")
        bar.outline.set_visible(False)

    plot = report.plot(
        "cka", draw, 6.4, "linear CKA between all pairs of layers",
        f"1: the same but for rotation and scale; 0: unrelated. Debiased, over {pictures} pictures; layer 0 is what "
        "the first block reads.",
    )  # fmt: skip
    text = (
        "Layers that are alike form bright blocks in dark, dark blocks in light colours. Models of masked pictures are "
        "reported to change less from layer to layer than supervised ones."
    )
    return section("cka", "Which layers are alike", paragraph(text), plot)


def spread_section(report: Report, found: Found) -> str:
    """Standard deviation of activations, block by block."""

    def draw(figure: Any, ink: Ink) -> None:
        axes = figure.subplots()
        for colour, (name, own) in zip(ink.series, found.items(), strict=False):
            axes.plot(own["std"], "o-", ms=4.5, color=colour, label=name)
            if "std at first" in own:
                axes.plot(own["std at first"], "--", lw=1.3, color=colour, label=f"{name}, before any training")
        axes.set(xlabel="layer", ylabel="standard deviation of activations")
        values = [value for own in found.values() for std in own.values() for value in std]
        if max(values) > LOGARITHMIC * min(values) > 0:
            logarithmic(axes.yaxis)
        else:
            from_zero(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper left")

    plot = report.plot(
        "spread", draw, 4.2, "standard deviation of activations behind every block",
        "Over tokens, channels and pictures; layer 0 is what the first block reads.",
    )  # fmt: skip
    text = (
        "Where norms stand before the branches, every branch adds to what comes before it, and activations grow with "
        "depth; where they stand behind (Swin V2), they hardly do. Large growth goes with unstable training."
    )
    heads = (
        "layer",
        *(escape(name) if key == "std" else "before any training" for name in found for key in found[name]),
    )
    rows = [
        [
            str(layer),
            *(number(own[key][layer]) if layer < len(own[key]) else "" for own in found.values() for key in own),
        ]
        for layer in range(max(len(own["std"]) for own in found.values()))
    ]
    return section("spread", "How far activations spread", paragraph(text), plot, table(heads, rows))
