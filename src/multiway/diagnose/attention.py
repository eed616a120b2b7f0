"""What every head looks at: attention distance, entropy, and how much the heads of a layer differ (vision.md 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multiway.diagnose.inputs import Pictures, open_models, open_pictures
from multiway.diagnose.page import Ink, Report, facts, from_zero, number, paragraph, section, table, tiles
from multiway.errors import ConfigError
from multiway.metrics.attention import HeadStatistics, head_statistics
from multiway.nn.attention import Attention, SelfAttention, attend_by_gemm
from multiway.nn.pixels import sides
from multiway.nn.window import Layout, WindowAttention
from multiway.plan import Plan
from multiway.pretrained import Pretrained

BATCH = 8
"""Pictures whose maps are there at once, of one layer."""
SPREAD = 0.4
"""Of a layer's place on the axis: what its dots take."""

Pair = tuple[int, int]
Found = Mapping[str, list[dict[str, Any]]]
"""Layers by model."""


@dataclass
class Layer:
    """One layer's statistics, summed over the pictures that were seen; ``alike``: of attention that is the same
    everywhere, distance and entropy.
    """

    alike: tuple[float, float]
    sums: list[np.ndarray] = field(default_factory=list)
    pictures: int = 0

    def add(self, found: HeadStatistics) -> None:
        """Add a batch of pictures."""
        new = [values.double().sum(0).cpu().numpy() for values in found]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.pictures += len(found.distance)

    def means(self) -> dict[str, Any]:
        """Means over the pictures: of every head ``distance`` in pixels and ``entropy`` in nats, of the layer
        ``divergence`` and ``cosine`` between heads; and ``uniform_distance`` and ``uniform_entropy``.
        """
        found = {name: own / self.pictures for name, own in zip(HeadStatistics._fields, self.sums, strict=True)}
        return found | dict(zip(("uniform_distance", "uniform_entropy"), self.alike, strict=True))


def run(
    out: Path, models: Sequence[str], *, data: str | None = None, split: str | None = None, count: int = 64
) -> Path:
    """Measure one model, or two beside each other, on ``count`` pictures; returns the page's path.

    ``models``, ``data``, ``split``: as `open_model` and `open_pictures` take them. Raises ConfigError for a model
    without attention.
    """
    report = Report(out)
    opened, pictures = open_models(models), open_pictures(data, split, count)
    found = {model.name: measure(model, pictures) for model in opened}
    figures = {"pictures": len(pictures), "data": pictures.origin}
    figures["models"] = {
        model.name: {"px": model.preprocessor.image_px, "layers": found[model.name]} for model in opened
    }
    sections = (
        tiles(*(tile for name, layers in found.items() for tile in ends(name, layers, len(found) > 1))),
        distance_section(report, found, opened),
        entropy_section(report, found),
        diversity_section(report, found),
        section("layers", "Layer by layer", *(layer_table(name, layers) for name, layers in found.items())),
        facts({
            "Models": ", ".join(found), "Pictures": f"{len(pictures)} from {pictures.origin}, evenly spread",
            "Rules": "class tokens and padding are dropped, rows scaled to sum to 1; Swins look inside their windows",
        }),
    )  # fmt: skip
    lead = (
        f"Attention of {escape(' and '.join(found))} on {len(pictures)} pictures: how far heads look, how evenly, and "
        "how much the heads of a layer differ."
    )
    own = [f"{name}: {layers[0]['distance'].mean():.1f} px in the first layer, {layers[-1]['distance'].mean():.1f} px "
           "in the last" for name, layers in found.items()]  # fmt: skip
    return report.finish(
        "What attention looks at", lead, sections, figures, "mean attention distance of " + "; ".join(own)
    )


# ----------------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def measure(model: Pretrained, pictures: Pictures) -> list[dict[str, Any]]:
    """`Layer.means` of every layer of a model's encoder, over all pictures.

    Raises ConfigError for a model without attention.
    """
    encoder: Any = model.model
    with watched(encoder, sides(model.preprocessor.image_px)) as layers:
        for [images] in pictures.batches([model], BATCH):
            encoder.encode(image=images)
    if not layers:
        raise ConfigError(
            f"{model.name}: this {type(encoder).__name__} has no attention to look at; ViTs, Swins and BEiT-3 have"
        )
    return [layer.means() for layer in layers.values()]


@contextmanager
def watched(model: Any, px: tuple[int, int]) -> Iterator[dict[nn.Module, Layer]]:
    """While it is open, every attention that pictures of ``px`` pass in ``model.encode`` adds to its layer, in order.

    Maps are computed beside the fused path, of one layer and batch at a time, and reduced at once: none is kept.
    """
    layers: dict[nn.Module, Layer] = {}
    grid = getattr(model.vision if hasattr(model, "vision") else model.encoder, "grid", None)

    def look(module: nn.Module, inputs: tuple[Any, ...], maps_of: Callable[..., Any]) -> None:
        maps, reach, places, real = maps_of(module, *inputs, px=px, grid=grid)
        if module not in layers:
            uniform = head_statistics(reach[None, :, None], places, real)
            layers[module] = Layer((float(uniform.distance), float(uniform.entropy)))
        layers[module].add(head_statistics(maps, places, real))

    hooks = [
        module.register_forward_pre_hook(partial(look, maps_of=maps_of))
        for module in model.modules()
        for kind, maps_of in KINDS.items()
        if isinstance(module, kind)
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


Seen = tuple[Tensor, Tensor, Tensor, Tensor]
"""Maps (B, W, H, N, N), what every token may look at (W or 1, N, N), places of tokens in pixels (W, N, 2), and which
are patches (W, N).
"""


def of_sequence(module: SelfAttention, x: Tensor, bias: Tensor | None = None, *, px: Pair, grid: Pair) -> Seen:
    """What a ViT's sequence sees; W is 1."""
    return module.maps(x, bias)[:, None], *_on_grid(x.shape[1], px, grid, x.device)


def of_packed(
    module: Attention, x: Tensor, plan: Plan, bias: Mapping[str, Tensor] | None = None, *, px: Pair, grid: Pair
) -> Seen:
    """What pictures alone see among packed rows (the vision half of BEiT-3 or VLMo); W is 1."""
    [group] = plan.groups
    q, k, _ = module.qkv(x, plan).view(group.samples, group.length, 3, module.heads, -1).permute(2, 0, 3, 1, 4)
    one = torch.eye(group.length, dtype=q.dtype, device=q.device)
    maps = attend_by_gemm(q, k, one, None if bias is None else bias[group.kind])
    return maps[:, None], *_on_grid(group.length, px, grid, x.device)


def of_windows(module: WindowAttention, x: Tensor, layout: Layout, *, px: Pair, grid: None) -> Seen:
    """What the windows of a Swin's map see."""
    maps = module.maps(x, layout)
    place = layout.unjoin.view(maps.shape[1:4])[:, 0] // layout.heads  # (W, N), in the padded map
    row, column = place // layout.size[1], place % layout.size[1]
    pixels = torch.tensor([px[0] / x.shape[1], px[1] / x.shape[2]], device=x.device)
    places, real = torch.stack([row, column], -1) * pixels, (row < x.shape[1]) & (column < x.shape[2])
    reach = torch.ones_like(maps[0, :, 0], dtype=torch.bool) if layout.apart is None else layout.apart[:, 0] == 0
    return maps, reach, places, real


def _on_grid(tokens: int, px: Pair, grid: Pair, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens may look at (all), their places and which are patches, of a row-major grid behind class tokens."""
    prefix = tokens - grid[0] * grid[1]
    rows, columns = (torch.arange(n, device=device) * (side / n) for n, side in zip(grid, px, strict=True))
    places = torch.cat([rows.new_zeros(prefix, 2), torch.cartesian_prod(rows, columns)])
    reach = torch.ones(1, tokens, tokens, dtype=torch.bool, device=device)
    return reach, places[None], (torch.arange(tokens, device=device) >= prefix)[None]


KINDS: dict[type[nn.Module], Callable[..., Seen]] = {
    SelfAttention: of_sequence,
    Attention: of_packed,
    WindowAttention: of_windows,
}
"""How the maps of each kind of attention are had."""


# ------------------------------------------------------------------------------------------------------------ sections


def ends(name: str, layers: list[dict[str, Any]], several: bool) -> list[tuple[str, str, str]]:
    """Tiles of the first and the last layer."""
    found = []
    for where, layer in (("first", layers[0]), ("last", layers[-1])):
        title = f"{escape(name)}, {where} layer" if several else f"distance in the {where} layer"
        note = f"looking everywhere alike: {layer['uniform_distance']:.1f} px"
        found.append((title, f"{layer['distance'].mean():.1f} <small>px</small>", note))
    return found


def distance_section(report: Report, found: Found, opened: Sequence[Pretrained]) -> str:
    """How far every head looks."""
    sizes = dict.fromkeys("x".join(map(str, sides(model.preprocessor.image_px))) for model in opened)

    def draw(figure: Any, ink: Ink) -> None:
        dots(figure.subplots(), ink, found, "distance")
        figure.axes[0].set(ylabel=f"attention distance, pixels of {' or '.join(sizes)}")

    plot = report.plot(
        "distance", draw, 4.2, "attention distance of every head, layer by layer",
        "A dot is a head: the mean distance between a patch and what it looks at. Dashed: attention that is the same "
        "everywhere.",
    )  # fmt: skip
    text = (
        "Masked image modelling is reported to keep heads of all ranges in every layer, near ones among them; after "
        "supervised or contrastive pre-training the top layers look far and alike."
    )
    return section("distance", "How far heads look", paragraph(text), plot)


def entropy_section(report: Report, found: Found) -> str:
    """How evenly every head looks."""

    def draw(figure: Any, ink: Ink) -> None:
        dots(figure.subplots(), ink, found, "entropy")
        figure.axes[0].set(ylabel="attention entropy, nats")

    plot = report.plot(
        "entropy", draw, 4.2, "attention entropy of every head, layer by layer",
        "0: every patch looks at one other. Dashed: at all of them alike, the logarithm of their number.",
    )  # fmt: skip
    return section("entropy", "How evenly they look", plot)


def diversity_section(report: Report, found: Found) -> str:
    """How much the heads of a layer differ."""

    def draw(figure: Any, ink: Ink) -> None:
        panels = (("divergence", "Kullback-Leibler divergence between heads, nats"), ("cosine", "cosine between heads"))
        for axes, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
            for colour, (model, layers) in zip(ink.series, found.items(), strict=False):
                x = np.arange(1, len(layers) + 1)
                axes.plot(x, [layer[name] for layer in layers], "o-", ms=5, color=colour, label=model)
            axes.set(title=label, xlabel="layer")
            from_zero(axes)
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(found) > 1:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left")

    plot = report.plot(
        "diversity", draw, 3.6, "divergence and cosine between the heads of a layer, layer by layer",
        "Left: higher is more diverse (mean of both directions). Right: lower is more diverse.",
    )  # fmt: skip
    return section("diversity", "How much the heads of a layer differ", plot)


def dots(axes: Any, ink: Ink, found: Found, name: str) -> None:
    """A dot per head and layer, models beside each other, and the value of attention that is the same everywhere."""
    for number_of, (colour, (model, layers)) in enumerate(zip(ink.series, found.items(), strict=False)):
        shift = 0.0 if len(found) == 1 else (number_of - 0.5) * SPREAD
        x = np.arange(1, len(layers) + 1) + shift
        width = SPREAD * 0.7 / len(found)
        for place, layer in zip(x, layers, strict=True):
            heads = np.sort(layer[name])
            across = place + np.linspace(-width, width, len(heads)) if len(heads) > 1 else [place]
            axes.plot(across, heads, "o", ms=4.5, color=colour, alpha=0.8, mew=0)
        axes.plot(
            x, [layer[name].mean() for layer in layers], "-", lw=1.2, color=colour, alpha=0.7, label=f"{model}, mean"
        )
        axes.plot(
            x,
            [layer[f"uniform_{name}"] for layer in layers],
            "--",
            lw=1.2,
            color=colour if len(found) > 1 else ink.soft,
        )
    axes.set(xlabel="layer")
    from_zero(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(found) > 1:
        axes.figure.legend(loc="outside upper left")


def layer_table(name: str, layers: list[dict[str, Any]]) -> str:
    """All figures of a model."""
    heads = ("layer", "heads", "distance, px", "nearest to farthest head", "alike everywhere", "entropy, nats",
             "alike everywhere", "divergence, nats", "cosine")  # fmt: skip
    rows = [
        [
            str(i), str(len(own["distance"])), number(own["distance"].mean()),
            f"{number(own['distance'].min())} to {number(own['distance'].max())}", number(own["uniform_distance"]),
            number(own["entropy"].mean()), number(own["uniform_entropy"]), number(float(own["divergence"])),
            number(float(own["cosine"])),
        ]
        for i, own in enumerate(layers, 1)
    ]  # fmt: skip
    return f"<h3>{escape(name)}</h3>{table(heads, rows)}"
