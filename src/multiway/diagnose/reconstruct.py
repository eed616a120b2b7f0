"""What a model makes of hidden pixels, and whether it infers or remembers: the demonstration of vision.md 7.6."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from multiway import config
from multiway.backbones.vit import whole_patches
from multiway.data.order import generator
from multiway.diagnose.hiding import described
from multiway.diagnose.inputs import open_model, open_pictures
from multiway.diagnose.page import Ink, Report, facts, marked, paragraph, section, table
from multiway.errors import ConfigError
from multiway.nn.patch import patchify, unpatchify
from multiway.nn.pixels import sides
from multiway.pretrained import Pretrained
from multiway.recipes.pictures import Hiding
from multiway.systems import mae, simmim

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the picture itself; x1 and y1 lie outside of the box."""

CELLS_ACROSS = 6
"""Cells across a picture, as SimMIM's 32 of 192 pixels."""
GREY = 128
"""What is drawn where pixels are hidden."""
ROW = 2.35
"""Inches of a picture's side."""
LETTERS = 22
"""That fit into a line beside it."""


@dataclass(frozen=True)
class Panel:
    """A picture with patches hidden, filled in, and as it was: uint8 (H, W, 3) each.

    ``hide``: bool (H, W); ``outline``: of the box, top, left, height and width in pixels of the picture as the model
    sees it, None = there is none.
    """

    name: str
    what: str
    filled: np.ndarray
    original: np.ndarray
    hide: np.ndarray
    outline: tuple[int, int, int, int] | None

    def figures(self) -> dict[str, Any]:
        """``ratio``: share that is hidden; ``error``: mean absolute difference there, of 255 levels; ``trivial``: that
        of the mean visible colour.
        """
        truth = self.original[self.hide].astype(float)
        colour = self.original[~self.hide].mean(0)
        error, trivial = (float(np.abs(guess - truth).mean()) for guess in (self.filled[self.hide], colour))
        return {
            "name": self.name,
            "what": self.what,
            "ratio": float(self.hide.mean()),
            "error": error,
            "trivial": trivial,
        }


def run(
    out: Path,
    model: str,
    *,
    data: str | None = None,
    split: str | None = None,
    boxes: Sequence[Box] = (),
    given: Mapping[str, Any] | None = None,
    count: int = 6,
    seed: int = 0,
) -> Path:
    """Fill in hidden patches of ``count`` pictures, and with ``boxes`` of one picture those of each box in three ways;
    returns the page's path.

    ``given``: values of `Hiding` that differ from those the model was trained with. Raises ConfigError for a model that
    does not predict pixels, and for a box that is too small or not in the picture.
    """
    report = Report(out)
    opened = open_model(model)
    fill = filler(opened)
    pictures = open_pictures(data, split, count)
    if boxes and len(pictures) > 1:
        raise ConfigError(f"a box lies in one picture, but there are several in {pictures.origin}: name its file")
    hiding = hiding_of(opened, given or {})
    shape: Any = opened.model.config
    grid = whole_patches(shape.image_px, shape.patch)
    panels = []
    for i, name in enumerate(pictures.names):
        original = pictures.original(i, shape.image_px)
        hide = hiding.of(grid, shape.patch)(generator(seed, "fill", i))
        panels.append(panel(opened, fill, original, hide, (name, described(hiding))))
        for number, box in enumerate(boxes, 1):
            inside = seen(opened, original, box)
            which = f"box {number}" if len(boxes) > 1 else "the box"
            for part, hide in of_box(inside, hiding, shape.patch, generator(seed, "box", number)).items():
                panels.append(panel(opened, fill, original, hide, (name, f"{part} of {which}"), bounds(inside)))
    relative = bool(getattr(shape, "normed", False) or getattr(shape, "target_window", 0))
    found = [own.figures() for own in panels]
    lead = (
        f"What {escape(opened.name)} makes of hidden patches. Only they are filled in: everything else is the picture."
    )
    sections = (
        panels_section(report, panels, found, relative, bool(boxes)),
        figures_section(found),
        facts({
            "Model": opened.name, "Pictures": f"{len(pictures)} from {pictures.origin}",
            "Seen at": "x".join(map(str, sides(shape.image_px))) + f" px, patches of {shape.patch}", "Seed": seed,
        }),
    )  # fmt: skip
    figures = {"model": opened.name, "data": pictures.origin, "relative": relative, "panels": found}
    error, trivial = (float(np.mean([own[name] for own in found])) for name in ("error", "trivial"))
    summary = f"hidden pixels are off by {error:.1f} of 255 levels, the mean visible colour by {trivial:.1f}"
    return report.finish("What a model makes of hidden pixels", lead, sections, figures, summary)


# ------------------------------------------------------------------------------------------------------ what is hidden


def hiding_of(model: Pretrained, given: Mapping[str, Any]) -> Hiding:
    """What is hidden: as in the run that trained the model, where its folder is a run's, else as its paper has it; with
    the ``given`` values instead.
    """
    shape: Any = model.model.config
    side = min(sides(shape.image_px))
    cell = shape.patch * max(1, round(side / CELLS_ACROSS / shape.patch))
    usual = Hiding(cell=cell) if isinstance(model.model, mae.MAE) else Hiding(scheme="cells", ratio=0.6, cell=cell)
    saved = Path(model.name) / "run.json"
    if saved.is_file():
        usual = config.apply(usual, config.read(saved).get("objective", {}))
        if usual.scheme != "cells":
            usual = dataclasses.replace(usual, cell=cell)
    hiding = dataclasses.replace(usual, **given)
    if hiding.cell % shape.patch:
        raise ConfigError(f"cells of {hiding.cell} pixels are not whole patches of {shape.patch}")
    return hiding


def parse_box(text: str) -> Box:
    """A box written as ``x0,y0,x1,y1``. Raises ConfigError for anything else."""
    try:
        x0, y0, x1, y1 = (int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--box {text}: expected four whole numbers of pixels, x0,y0,x1,y1") from error
    return x0, y0, x1, y1


def seen(model: Pretrained, original: Tensor, box: Box) -> np.ndarray:
    """Where a box of a picture, uint8 (3, H, W), lies in what the model sees of it: bool (px, px).

    Raises ConfigError for a box that is none, or is not in the picture or the part of it that the model sees.
    """
    height, width = original.shape[1:]
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ConfigError(
            f"box {x0},{y0},{x1},{y1} is not in the picture of {width}x{height} pixels: expected x0,y0,x1,y1 with "
            f"0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
        )
    white = torch.zeros_like(original)
    white[:, y0:y1, x0:x1] = 255
    inside = (model.picture(white)[0] > 127).numpy()
    if not inside.any():
        raise ConfigError(f"box {x0},{y0},{x1},{y1} is outside of the part of the picture that the model looks at")
    return inside


def bounds(inside: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of the True pixels."""
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def of_box(inside: np.ndarray, hiding: Hiding, patch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The three patterns of the demonstration, bool (P,): random cells, half of those that touch the box; patches
    within the box but for a rim, a quarter of a patch and an eighth of a cell at least; all cells that touch it.

    Raises ConfigError for a box without such an inside, and for one that leaves nothing visible.
    """
    cell, (rows, columns) = hiding.cell, inside.shape
    padded = np.pad(inside, ((0, -rows % cell), (0, -columns % cell)))

    def patches(cells: np.ndarray) -> np.ndarray:
        times = cell // patch
        return cells.repeat(times, 0).repeat(times, 1)[: rows // patch, : columns // patch].reshape(-1)

    cells = padded.reshape(len(padded) // cell, cell, -1, cell).max((1, 3))
    half = np.zeros_like(cells)
    among = np.flatnonzero(cells)
    half.flat[rng.permutation(among)[: math.ceil(len(among) / 2)]] = True
    top, left, height, width = bounds(inside)
    rim = max(math.ceil(patch / 4), cell // 8)
    inner = np.zeros_like(inside)
    inner[top + rim : top + height - rim, left + rim : left + width - rim] = True
    whole = inner.reshape(rows // patch, patch, -1, patch).min((1, 3)).reshape(-1)
    if not whole.any():
        raise ConfigError(
            f"the box is {height}x{width} pixels in what the model sees: too small for a rim around a patch of "
            f"{patch}; {3 * patch}x{3 * patch} are always enough"
        )
    if cells.all():
        raise ConfigError("the box covers the whole picture: nothing would stay visible, take a smaller one")
    return {"half": patches(half), "all but a rim": whole, "all": patches(cells)}


# --------------------------------------------------------------------------------------------------------- filling in

Fill = Callable[[Any, Tensor, Tensor], Tensor]
"""Model, picture uint8 (1, 3, H, W) and hide bool (P,) -> pixels as it predicts them, normalised (1, 3, H, W)."""


def filler(model: Pretrained) -> Fill:
    """How a model fills pixels in. Raises ConfigError for one that cannot."""
    shape: Any = model.model.config
    if isinstance(model.model, mae.MAE) and shape.decoder_depth:
        return by_mae
    if isinstance(model.model, simmim.SimMIM) and shape.masked:
        return by_simmim
    raise ConfigError(
        f"{model.name}: this {type(model.model).__name__} does not predict pixels; an MAE with its decoder or a SimMIM "
        "with its linear map does, as `multiway train mae.quick` leaves it"
    )


def by_mae(model: mae.MAE, image: Tensor, hide: Tensor) -> Tensor:
    """MAE's decoder; patches that it predicts relative to their mean and deviation get those of the picture."""
    patch = model.config.patch
    hidden, keep = hide.nonzero()[:, 0], (~hide).nonzero()[None, :, 0]
    found = model.predict(image, keep, hidden).float().unflatten(1, (-1, 3)).transpose(1, 2).flatten(1)
    patches = patchify(model.pixels(image), patch)[0]
    if model.config.normed:
        variance, mean = torch.var_mean(patches[hidden], dim=1, keepdim=True)
        found = found * (variance + mae.VARIANCE_EPS).sqrt() + mean
    return unpatchify(patches.index_copy(0, hidden, found)[None], patch, model.encoder.grid)


def by_simmim(model: simmim.SimMIM, image: Tensor, hide: Tensor) -> Tensor:
    """SimMIM's linear map; pixels that it predicts relative to their surroundings get those of the picture."""
    found = model.reconstruct(image, hide[None]).float()
    window = model.config.target_window
    if not window:
        return found
    pixels, half = model.pixels(image), window // 2
    count = F.avg_pool2d(torch.ones_like(pixels), window, 1, half) * window**2
    mean, squares = (F.avg_pool2d(x, window, 1, half, count_include_pad=False) for x in (pixels, pixels.square()))
    variance = ((squares - mean.square()) * (count / (count - 1))).clamp(min=0)
    return found * (variance + simmim.VARIANCE_EPS).sqrt() + mean


@torch.inference_mode()
def panel(
    model: Pretrained,
    fill: Fill,
    original: Tensor,
    hide: np.ndarray,
    titles: tuple[str, str],
    outline: tuple[int, int, int, int] | None = None,
) -> Panel:
    """A picture, uint8 (3, H, W) in its own size, with patches (P,) hidden and filled in."""
    shape: Any = model.model.config
    image = model.picture(original)
    found = fill(model.model, image[None].to(model.device), torch.from_numpy(hide).to(model.device))[0].cpu()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (shape.mean, shape.std))
    found = ((found * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    rows, columns = whole_patches(shape.image_px, shape.patch)
    pixels = hide.reshape(rows, columns).repeat(shape.patch, 0).repeat(shape.patch, 1)
    filled = torch.where(torch.from_numpy(pixels), found, image)
    return Panel(*titles, filled.permute(1, 2, 0).numpy(), image.permute(1, 2, 0).numpy(), pixels, outline)


# ------------------------------------------------------------------------------------------------------------ sections


def panels_section(
    report: Report, panels: Sequence[Panel], found: Sequence[Mapping[str, Any]], relative: bool, boxed: bool
) -> str:
    """Every picture three times."""

    def draw(figure: Any, ink: Ink) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots(len(panels), 4, width_ratios=[0.75, 1, 1, 1], squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for heading, axis in zip(("what the model sees", "filled in", "the picture"), axes[0, 1:], strict=True):
            axis.set_title(heading, loc="center", color=ink.soft)
        for row, own, figures in zip(axes, panels, found, strict=True):
            name = own.name if len(own.name) <= LETTERS else f"…{own.name[1 - LETTERS :]}"
            told = f"{name}\n{textwrap.fill(own.what, LETTERS)}\n{100 * figures['ratio']:.0f} % hidden"
            told += f"\noff by {figures['error']:.1f} of 255"
            row[0].text(0, 0.5, told, va="center", ha="left", fontsize=9.5, linespacing=1.4)
            hidden = np.where(own.hide[..., None], GREY, own.original).astype(np.uint8)
            for axis, image in zip(row[1:], (hidden, own.filled, own.original), strict=True):
                axis.imshow(image, interpolation="nearest" if min(image.shape[:2]) >= 128 else "lanczos")
            if own.outline is not None:
                top, left, height, width = own.outline
                row[3].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, ec="#ffd23f", lw=1.6))

    note = (
        "The model predicts pixels relative to their own mean and deviation, which are taken from the original: the "
        "colours of large areas are given, what is inferred is what is in them."
        if relative
        else "All that is filled in is the model’s own."
    )
    plot = report.plot(
        "filled", draw, ROW * len(panels) + 0.3, "pictures with patches hidden, filled in, and whole", note
    )
    text = (
        "Half of a thing hidden can be continued from what is left of it, nearly all of it still be inferred. A thing "
        "that is hidden completely is not restored, only its surroundings are continued: a model that brought it back "
        "would remember the picture rather than infer from it."
    )
    return section("panels", "Hidden, filled in, original", *([paragraph(text)] if boxed else []), plot)


def figures_section(found: Sequence[Mapping[str, Any]]) -> str:
    """The errors of all."""
    rows = [
        [
            escape(own["name"]), own["what"], f"{100 * own['ratio']:.0f} %",
            marked(f"{own['error']:.1f}", "good" if own["error"] < own["trivial"] else "bad"), f"{own['trivial']:.1f}",
        ]
        for own in found
    ]  # fmt: skip
    heads = ("picture", "what is hidden", "share", "off by, of 255", "mean visible colour is off by")
    text = "Mean absolute difference of hidden pixels; green: less than the mean colour of what is visible."
    return section("figures", "How far off", paragraph(text), table(heads, rows))
