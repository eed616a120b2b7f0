"""Scenes of real handwriting, made on the spot: training data with exact truth and no download.

The digits are scikit-learn's `load_digits`: 1,797 handwritten 8x8 digits (Alpaydin and Kaynak, "Optical Recognition of
Handwritten Digits", UCI, CC BY 4.0), ordered by writer. The two splits share no writer: the boundary between the halves
of the file lies between samples 905 and 915, and the samples around it are left out.

Every scene is a pure function of its arguments. Its objects are the truth; what can be said of them is written in
`builtin_language`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from multiway.data.builtin_language import (
    COLOURS,
    DIGITS,
    ROWS,
    Object,
    Scene,
    article,
    describe,
    place_name,
    questions,
    relations,
    statement,
    write_captions,
)
from multiway.errors import ConfigError, DataError

__all__ = [
    "COLOURS",
    "DIGITS",
    "Object",
    "Scene",
    "SceneSet",
    "Split",
    "describe",
    "digit_prompts",
    "export",
    "ink",
    "ink_patches",
    "one_digit_scenes",
    "questions",
    "relations",
    "retrieval_scenes",
    "scene",
    "scenes",
    "statement",
]

Split = Literal["train", "eval"]

_SAMPLES = {"train": (0, 898), "eval": (915, 1797)}  # half-open ranges of load_digits
_SIZES = (0.82, 0.88, 0.94, 1.0)  # of the cell, with a tenth of margin on every side of the handwriting
_SLANTS = (-0.12, 0.0, 0.12)
_TEXTURES = 48


@dataclass(frozen=True, eq=False)
class SceneSet:
    """Scenes rendered once: `images` is one contiguous uint8 array (n, 3, H, W), the lists have length n."""

    indices: list[int]
    cells: int
    images: np.ndarray
    objects: list[tuple[Object, ...]]
    captions: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Scene:
        return Scene(self.indices[i], self.cells, self.images[i], self.objects[i], self.captions[i])


def scene(
    split: Split, index: int, *, seed: int = 0, cells: int = 2, cell_px: int = 32, digits: tuple[int, int] = (1, 4)
) -> Scene:
    """Return scene number `index` of a split: a pure function of its arguments.

    `cells` is the side of the canvas in cells (2 or 3), `cell_px` that of a cell in pixels (16 or more), `digits` the
    least and the most digits of a scene, all counts being equally likely.
    Raises ConfigError for arguments out of range, and where scikit-learn is not installed.
    """
    kind = _Kind(split, seed, cells, cell_px, digits)
    image = np.empty((3, kind.side_px, kind.side_px), np.uint8)
    objects, captions = _make(image, kind, index)
    return Scene(index, cells, image, objects, captions)


def scenes(
    split: Split,
    count: int,
    *,
    seed: int = 0,
    cells: int = 2,
    cell_px: int = 32,
    digits: tuple[int, int] = (1, 4),
    start: int = 0,
) -> SceneSet:
    """Return scenes `start` to `start + count - 1` of a split, each as `scene` gives it."""
    return _collect(iter(range(start, start + count)), count, _Kind(split, seed, cells, cell_px, digits))


def retrieval_scenes(
    count: int, seed: int = 0, *, cells: int = 2, cell_px: int = 32, digits: tuple[int, int] = (1, 4)
) -> SceneSet:
    """Return `count` evaluation scenes of which no two have the same digits and colours in the same cells.

    A caption tells all of this, so each caption identifies its scene among them.
    Raises ConfigError if `digits` and `cells` do not allow so many different scenes.
    """
    kind = _Kind("eval", seed, cells, cell_px, digits)

    def unseen() -> Iterator[int]:
        seen = set()
        for index in range(20 * count + 100):
            description = describe(_layout(kind.generator(index), kind))
            if description not in seen:
                seen.add(description)
                yield index
        raise ConfigError(f"found {len(seen)} different scenes of {digits} digits, not {count}: allow more digits")

    return _collect(unseen(), count, kind)


def one_digit_scenes(count: int, seed: int = 0, *, cells: int = 2, cell_px: int = 32) -> tuple[SceneSet, np.ndarray]:
    """Return evaluation scenes of one digit each, and these digits as int64 (count,)."""
    found = scenes("eval", count, seed=seed, cells=cells, cell_px=cell_px, digits=(1, 1))
    return found, np.array([objects[0].digit for objects in found.objects], np.int64)


def digit_prompts(cells: int = 2) -> list[list[str]]:
    """Return the prompts of each of the ten digits: "a red three at the top left" in every colour and cell."""
    places = [place_name(row, column, cells) for row in range(cells) for column in range(cells)]
    return [[f"{article(f'{c} {word}')} at the {place}" for c in COLOURS for place in places] for word in DIGITS]


def ink(scene: Scene) -> np.ndarray:
    """Return bool (objects, H, W): True where an object's handwriting covers at least half of the pixel."""
    side = scene.image.shape[-1]
    found = np.zeros((len(scene.objects), side, side), bool)
    for layer, o in zip(found, scene.objects, strict=True):
        alpha = _glyphs(side // scene.cells)[o.variant][0][o.sample]
        (x, y), size = o.corner, len(alpha)
        layer[y : y + size, x : x + size] = alpha >= 128
    return found


def ink_patches(scenes: SceneSet, patch: int) -> np.ndarray:
    """Which patches of each scene show handwriting: bool (N, P), P row-major."""
    shown = np.stack([ink(scenes[i]).any(0) for i in range(len(scenes))])  # (N, H, W)
    n, h, w = shown.shape
    return shown.reshape(n, h // patch, patch, w // patch, patch).any((2, 4)).reshape(n, -1)


def export(
    folder: str | Path,
    split: Split,
    count: int,
    *,
    seed: int = 0,
    cells: int = 2,
    cell_px: int = 32,
    digits: tuple[int, int] = (1, 4),
) -> Path:
    """Write scenes as files: `000000.png` and so on, and `captions.jsonl` with {"image", "captions", "objects"} a line.

    Returns the path of `captions.jsonl`. Raises DataError if the folder is not empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: give a new folder, so that no old picture stays among the new ones")
    captions = folder / "captions.jsonl"
    with captions.open("w", encoding="utf-8") as lines:
        for index in range(count):
            found = scene(split, index, seed=seed, cells=cells, cell_px=cell_px, digits=digits)
            name = f"{index:06d}.png"
            Image.fromarray(found.image.transpose(1, 2, 0)).save(folder / name)
            record = {"image": name, "captions": found.captions, "objects": [asdict(o) for o in found.objects]}
            lines.write(json.dumps(record) + "\n")
    return captions


# Making a scene


@dataclass(frozen=True)
class _Kind:
    """The arguments that scenes of one kind share."""

    split: str
    seed: int
    cells: int
    cell_px: int
    digits: tuple[int, int]

    def __post_init__(self) -> None:
        if self.split not in _SAMPLES:
            raise ConfigError(f"split is {self.split!r}, expected one of {', '.join(_SAMPLES)}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected 0 or more")
        if self.cells not in ROWS:
            raise ConfigError(f"cells is {self.cells}, expected 2 or 3")
        if self.cell_px < 16:
            raise ConfigError(f"cell_px is {self.cell_px}, expected 16 or more: smaller handwriting is illegible")
        if not 1 <= self.digits[0] <= self.digits[1] <= self.cells**2:
            raise ConfigError(f"digits is {self.digits}, expected 1 <= least <= most <= {self.cells**2} cells")

    @property
    def side_px(self) -> int:
        return self.cells * self.cell_px

    def generator(self, index: int) -> np.random.Generator:
        stream = list(_SAMPLES).index(self.split)
        return np.random.Generator(np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, stream]))


def _collect(indices: Iterator[int], count: int, kind: _Kind) -> SceneSet:
    found = SceneSet([], kind.cells, np.empty((count, 3, kind.side_px, kind.side_px), np.uint8), [], [])
    for image in found.images:
        index = next(indices)
        objects, captions = _make(image, kind, index)
        found.indices.append(index)
        found.objects.append(objects)
        found.captions.append(captions)
    return found


def _make(image: np.ndarray, kind: _Kind, index: int) -> tuple[tuple[Object, ...], tuple[str, ...]]:
    """Paint a scene into `image`; its layout is drawn first, so that it can be known without painting."""
    rng = kind.generator(index)
    objects = _layout(rng, kind)
    captions = write_captions(objects, kind.cells, rng)
    _paint(image, objects, kind.cells, rng)
    return objects, captions


def _layout(rng: np.random.Generator, kind: _Kind) -> tuple[Object, ...]:
    glyphs, samples, colours = _glyphs(kind.cell_px), _samples(kind.split), list(COLOURS)
    count = rng.integers(kind.digits[0], kind.digits[1] + 1)
    places = np.sort(rng.permutation(kind.cells**2)[:count]).tolist()
    shown = rng.integers((10, len(colours), len(glyphs)), size=(count, 3)).tolist()
    chances = rng.random((count, 3)).tolist()
    objects = []
    for place, (digit, colour, variant), (pick, across, down) in zip(places, shown, chances, strict=True):
        sample = samples[digit][int(pick * len(samples[digit]))]
        alpha, boxes = glyphs[variant]
        row, column = divmod(place, kind.cells)
        free = kind.cell_px - alpha.shape[-1] + 1
        x, y = column * kind.cell_px + int(across * free), row * kind.cell_px + int(down * free)
        x0, y0, x1, y1 = boxes[sample]
        box = (x + x0, y + y0, x + x1, y + y1)
        objects.append(Object(digit, colours[colour], row, column, box, sample, variant, (x, y)))
    return tuple(objects)


def _paint(image: np.ndarray, objects: tuple[Object, ...], cells: int, rng: np.random.Generator) -> None:
    """Lay each object's colour over a dark, lightly textured canvas, its handwriting being the opacity."""
    side = image.shape[-1]
    textures = _textures(side)
    tint = (rng.uniform(14, 58) + rng.uniform(-10, 10, 3)).astype(np.float32)
    canvas = tint[:, None, None] + textures[rng.integers(len(textures))]
    inks = rng.uniform(0.9, 1.0, (len(objects), 1)) * [COLOURS[o.colour] for o in objects]
    for o, rgb in zip(objects, inks.astype(np.float32), strict=True):
        alpha = _glyphs(side // cells)[o.variant][0][o.sample].astype(np.float32) / 255
        (x, y), size = o.corner, len(alpha)
        patch = canvas[:, y : y + size, x : x + size]
        patch += (rgb[:, None, None] - patch) * alpha
    np.clip(canvas, 0, 255, out=canvas)
    image[:] = canvas


@lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """The handwriting as float64 (1797, 64) in [0, 1] and its digits as int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError('the built-in data needs scikit-learn: pip install "multiway[quickstart]"') from error
    images, labels = load_digits(return_X_y=True)
    return images / 16, labels


@lru_cache
def _samples(split: str) -> list[list[int]]:
    """The samples of each digit in a split."""
    first, last = _SAMPLES[split]
    labels = _digits()[1]
    return [(first + np.flatnonzero(labels[first:last] == digit)).tolist() for digit in range(10)]


@lru_cache
def _glyphs(cell_px: int) -> list[tuple[np.ndarray, list[tuple[int, int, int, int]]]]:
    """For each size and slant, the opacity of all handwriting, uint8 (1797, size, size), and the box of its ink."""
    drawn = []
    for size in (round(part * cell_px) for part in _SIZES):
        for slant in _SLANTS:
            alpha = (_digits()[0] @ _enlarge(size, slant)).reshape(-1, size, size)
            alpha = np.clip((alpha - 0.15) / 0.6, 0, 1)  # thinner, crisper strokes than plain interpolation gives
            alpha = np.rint(alpha * 255).astype(np.uint8)
            drawn.append((alpha, _boxes(alpha >= 128)))
    return drawn


def _enlarge(size: int, slant: float) -> np.ndarray:
    """Bicubic enlargement with a slant, as a matrix (64, size * size), interpolation being linear in the pixels."""
    ratio = 10 / size
    matrix = np.empty((64, size * size))
    for pixel, row in enumerate(matrix):
        source = np.zeros((10, 10), np.float32)  # one pixel of margin lets the strokes fade out
        source[1 + pixel // 8, 1 + pixel % 8] = 1
        affine = (ratio, slant * ratio, -5 * slant, 0, ratio, 0)
        large = Image.fromarray(source).transform(
            (size, size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
        )
        row[:] = np.asarray(large).ravel()
    return matrix


def _boxes(ink: np.ndarray) -> list[tuple[int, int, int, int]]:
    size = ink.shape[-1]
    across, down = np.max(ink, 1), np.max(ink, 2)
    edges = (across.argmax(1), down.argmax(1), size - across[:, ::-1].argmax(1), size - down[:, ::-1].argmax(1))
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in np.stack(edges, 1).tolist()]


@lru_cache
def _textures(side: int) -> np.ndarray:
    """Grey textures to add to a canvas, float32 (n, side, side): a slope, soft clouds and fine grain."""
    rng = np.random.Generator(np.random.Philox(key=[side, 0]))
    ramp = np.linspace(-1, 1, side)
    found = []
    for _ in range(_TEXTURES):
        slope = 10 * (rng.uniform(-1, 1) * ramp[:, None] + rng.uniform(-1, 1) * ramp)
        clouds = Image.fromarray(rng.normal(0, 5, (5, 5)).astype(np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        found.append(slope + np.asarray(clouds) + rng.normal(0, 2.5, (side, side)))
    return np.stack(found).astype(np.float32)
