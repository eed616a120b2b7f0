"""Swin: a hierarchical vision Transformer with shifted windows (Liu et al., 2021, arXiv 2103.14030).

Patches of 4 pixels become vectors; four stages of pre-norm blocks follow, each on a map half as fine and twice as wide
as the one before. Attention sees the tokens of its window, with a learned bias for every offset; every second block
shifts the windows by half, so that neighbours meet. The class is read from the mean of the last map, normed.

Where we differ: pictures of any size are read, padded as the detection code of the same authors does it; and a map is
not shifted where it is no larger than its window, at any size, as their classification code does it at its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from multiway.backbones.swin import SwinModel, build_swin
from multiway.nn.linear import Linear
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD, Colour, Size
from multiway.weights.layouts import under
from multiway.weights.rename import WeightMap
from multiway.weights.swin import BUFFERS, NEXT_STAGE, OFFICIAL, TRANSFORMERS

INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a Swin.

    ``dim``, ``heads``: of the first stage, doubled from stage to stage; ``depths``: blocks of each; ``window``: side of
    the windows, smaller where the map of a stage is; ``image_px``: side, or height and width, that windows are chosen
    for; ``drop_path``: rate of the last block; ``classes``: of the classifier, 0 = none; ``mean``, ``std``: of the
    pixels; ``share``: of the shorter side that evaluation looks at.
    """

    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: int = 3
    window: int = 7
    patch: int = 4
    image_px: int | tuple[int, int] = 224
    drop_path: float = 0.2
    classes: int = 0
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    share: float = 224 / 256

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)


_SMALL = Config(depths=(2, 2, 18, 2), drop_path=0.3, classes=1000)
_BASE = dataclasses.replace(_SMALL, dim=128, heads=4, drop_path=0.5)
_LARGE = dataclasses.replace(_SMALL, dim=192, heads=6, drop_path=0.2)
_AT_384 = {"window": 12, "image_px": 384, "share": 1.0}

# vision.md 5.1: 28,288,354, 49,606,258, 87,768,224 and 196,532,476 parameters at 224. ImageNet-22k: classes=21841.
# Micro is ours, for tests and studies on CPUs.
PRESETS: Mapping[str, Config] = {
    "swin_micro_patch2_window4_32": Config(
        dim=64, depths=(2, 4, 2), heads=2, window=4, patch=2, image_px=32, drop_path=0.0, share=1.0
    ),
    "swin_tiny_patch4_window7_224": Config(classes=1000),
    "swin_small_patch4_window7_224": _SMALL,
    "swin_base_patch4_window7_224": _BASE,
    "swin_base_patch4_window12_384": dataclasses.replace(_BASE, **_AT_384),
    "swin_large_patch4_window7_224": _LARGE,
    "swin_large_patch4_window12_384": dataclasses.replace(_LARGE, **_AT_384),
}


class Swin(SwinModel):
    """The encoder, perhaps a classifier."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_swin(
            image_px=config.image_px, patch=config.patch, dim=config.dim, depths=config.depths, heads=config.heads,
            window=config.window, drop_path=config.drop_path,
        )  # fmt: skip
        if config.classes:
            self.head = Linear(self.encoder.width, config.classes)

    def set_image_size(self, image_px: Size, window: int | None = None) -> None:
        """Choose the windows for pictures of another size, None = of the same side where maps are large enough; tables
        of biases are resized bicubically. Without it pictures of any size are read, by the windows there are.
        """
        self.config = dataclasses.replace(self.config, image_px=image_px, window=window or self.config.window)
        self.encoder.set_size(image_px, self.config.window)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of deviation .02, biases 0, norms 1 and 0."""
        self.encoder.init_weights()
        if self.config.classes:
            nn.init.normal_(self.head.weight, std=INIT_STD)
            nn.init.zeros_(self.head.bias)


LAYOUTS: Mapping[str, WeightMap] = {
    "official": WeightMap(
        rules=(*under("encoder.", "", OFFICIAL), ("head.{part}", "head.{part}")),
        dropped=BUFFERS,
    ),
    "timm": WeightMap(
        rules=(*under("encoder.", "", OFFICIAL), ("head.{part}", "head.fc.{part}")),
        words=NEXT_STAGE,
        dropped=BUFFERS,
    ),
    "transformers": WeightMap(
        rules=(*under("encoder.", "swin.", TRANSFORMERS), ("head.{part}", "classifier.{part}")),
        dropped=BUFFERS,
        prefix="swin.",
    ),
}
"""Layouts of published files."""
