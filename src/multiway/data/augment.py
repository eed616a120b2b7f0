"""What classification changes about a picture: RandAugment, and the draws of random erasing, mixup and CutMix.

All numbers are those of timm as ViT, Swin, MAE, SimMIM and BEiT were fine-tuned with it (vision.md 2.3). RandAugment is
done here, to pixels; what is only drawn here is done on the device, to the normalised batch
(`multiway.objectives.mixing`).

Where we differ: timm draws one mix for a batch and mixes it with itself reversed; here every pair of neighbours
(2i, 2i + 1) has a mix of its own, so that what a picture is mixed with depends on its place in the step alone, not on
how the step is cut into micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels; NOWHERE has no height."""

NOWHERE: Box = (0, 0, 0, 0)
ERASE_TRIES = 10
ERASE_SHARE = (0.02, 1 / 3)
"""Range of the erased share of the area, uniform."""
ERASE_ASPECT = (0.3, 1 / 0.3)
"""Range of height / width of the erased box, log-uniform."""


def erase_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """Draw the box that random erasing covers; NOWHERE when none of ERASE_TRIES draws fits inside the picture."""
    low, high = math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])
    for _ in range(ERASE_TRIES):
        area = height * width * rng.uniform(*ERASE_SHARE)
        aspect = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return NOWHERE


def draw_mix(height: int, width: int, mixup: float, cutmix: float, rng: np.random.Generator) -> tuple[float, Box]:
    """Draw how two pictures are mixed: the share that each keeps of itself, and the box each takes from the other.

    ``mixup``, ``cutmix``: a of Beta(a, a) for the share, 0 = never; where both are on, each has probability .5. In
    mixup the box is NOWHERE: the whole pictures are blended. In CutMix the box's sides are sqrt(1 - share) of the
    picture's, its centre is uniform, and the share is that of what is left after it was clipped to the picture.
    """
    if not cutmix or (mixup and rng.random() < 0.5):
        return float(rng.beta(mixup, mixup)), NOWHERE
    side = math.sqrt(1 - rng.beta(cutmix, cutmix))
    top, bottom = _clipped(height, int(height * side), rng)
    left, right = _clipped(width, int(width * side), rng)
    area = (bottom - top) * (right - left)
    return 1 - area / (height * width), (top, left, bottom - top, right - left) if area else NOWHERE


def _clipped(whole: int, part: int, rng: np.random.Generator) -> tuple[int, int]:
    """First and one past the last pixel of a part with a uniform centre, clipped to the whole."""
    centre = int(rng.integers(whole))
    return max(0, centre - part // 2), min(whole, centre + part // 2)


Fill = tuple[int, int, int]
Op = Callable[[Image.Image, float, float, Fill], Image.Image]
"""Picture, strength x in [0, 1], sign s of -1 or 1, colour of what comes into view -> picture."""


def _posterize(picture: Image.Image, x: float, s: float, fill: Fill) -> Image.Image:
    bits = 4 - int(4 * x)  # none at full strength, which Pillow's own refuses
    return picture.point([v & -(256 >> bits) for v in range(256)] * 3)


def _solarize_add(picture: Image.Image, x: float, s: float, fill: Fill) -> Image.Image:
    add = min(128, int(110 * x))
    return picture.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


def _enhance(quality: Callable[[Image.Image], Any]) -> Op:
    return lambda picture, x, s, fill: quality(picture).enhance(max(0.1, 1 + 0.9 * x * s))


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Op:
    """``matrix``: signed strength, width, height -> the six numbers that give the place in the old picture."""

    def op(picture: Image.Image, x: float, s: float, fill: Fill) -> Image.Image:
        numbers = matrix(x * s, *picture.size)
        return picture.transform(
            picture.size, Image.Transform.AFFINE, numbers, Image.Resampling.BICUBIC, fillcolor=fill
        )

    return op


OPS: Mapping[str, Op] = {
    "identity": lambda picture, x, s, fill: picture,
    "auto_contrast": lambda picture, x, s, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, x, s, fill: ImageOps.equalize(picture),
    "invert": lambda picture, x, s, fill: ImageOps.invert(picture),
    "rotate": lambda picture, x, s, fill: picture.rotate(30 * x * s, Image.Resampling.BICUBIC, fillcolor=fill),
    "posterize": _posterize,
    "solarize": lambda picture, x, s, fill: ImageOps.solarize(picture, 256 - min(256, int(256 * x))),
    "solarize_add": _solarize_add,
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda xs, width, height: (1, 0.3 * xs, 0, 0, 1, 0)),
    "shear_y": _affine(lambda xs, width, height: (1, 0, 0, 0.3 * xs, 1, 0)),
    "translate_x": _affine(lambda xs, width, height: (1, 0, 0.45 * xs * width, 0, 1, 0)),
    "translate_y": _affine(lambda xs, width, height: (1, 0, 0, 0, 1, 0.45 * xs * height)),
}
"""Changes of pictures, of which those that have a strength grow stronger with the magnitude (timm's ``inc1``)."""

USUAL = tuple(name for name in OPS if name != "identity")
"""What RandAugment draws from."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Random changes of colour and shape: ``augment(image, rng)`` maps uint8 (3, H, W) to uint8 (3, H, W).

    ``ops`` of ``names`` (in OPS) are drawn with replacement, each is applied with probability ``chance``, at a
    magnitude from N(``magnitude``, ``deviation``) clipped to [0, 10]; ``fill``: the colour 0 to 255 of what comes into
    view, the mean of the data. Source: vision.md 2.3, timm's ``rand-m9-mstd0.5-inc1``.
    """

    ops: int = 2
    magnitude: float = 9.0
    deviation: float = 0.5
    chance: float = 0.5
    fill: Fill = (124, 116, 104)
    names: tuple[str, ...] = USUAL

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the changed picture; what is taken from ``rng`` does not depend on it."""
        which = rng.integers(len(self.names), size=self.ops)
        applied = rng.random(self.ops) < self.chance
        strength = np.clip(rng.normal(self.magnitude, self.deviation, self.ops), 0, 10) / 10
        sign = rng.choice((-1.0, 1.0), self.ops)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for i in np.flatnonzero(applied):
            picture = OPS[self.names[which[i]]](picture, float(strength[i]), float(sign[i]), self.fill)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


PAIRED = RandAugment(
    magnitude=7.0, deviation=0.0, fill=(128, 128, 128),
    names=(
        "identity", "auto_contrast", "equalize", "brightness", "sharpness", "shear_x", "shear_y", "translate_x",
        "translate_y", "rotate",
    ),
)  # fmt: skip
"""For pictures with texts, whose colours must stay (masked.md 6.4); strengths are those of the ops above."""
