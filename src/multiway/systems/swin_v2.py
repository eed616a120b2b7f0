"""Swin V2: scaling up capacity and resolution (Liu et al., 2021, arXiv 2111.09883).

Swin with three changes. Norms stand behind the branches and start at zero (res-post-norm), so activations do not grow
with depth and every block is the identity at first. Scores are cosines times a learned scale, at most 100. Biases of
offsets come from a small MLP that reads them on a logarithmic scale, so a model serves larger pictures and windows than
it was trained with, without interpolation.

Where we differ: pictures of any size are read, as in Swin. The paper's extra norm after every 6 blocks of H and G is
not here: the published sizes of H, g and G have no parameters for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from multiway.backbones.swin import SwinModel, build_swin_v2
from multiway.errors import ConfigError
from multiway.nn.linear import Linear
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD, Colour, Size
from multiway.weights.layouts import Rules, under
from multiway.weights.rename import WeightMap
from multiway.weights.swin import BUFFERS, NEXT_STAGE, OFFICIAL, TRANSFORMERS

INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a Swin V2.

    ``dim``, ``heads``: of the first stage, doubled from stage to stage; ``depths``: blocks of each; ``window``: side of
    the windows, smaller where the map of a stage is; ``pretrained_window``: side of every stage's windows when the
    biases were trained, empty = as they are; ``image_px``: side, or height and width, that windows are chosen for;
    ``drop_path``: rate of the last block; ``classes``: of the classifier, 0 = none; ``mean``, ``std``: of the pixels;
    ``share``: of the shorter side that evaluation looks at.
    """

    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: int = 3
    window: int = 8
    pretrained_window: tuple[int, ...] = ()
    patch: int = 4
    image_px: int | tuple[int, int] = 256
    drop_path: float = 0.2
    classes: int = 0
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    share: float = 224 / 256

    def __post_init__(self) -> None:
        if self.pretrained_window and len(self.pretrained_window) != len(self.depths):
            raise ConfigError(
                f"pretrained_window needs a side per stage, got {self.pretrained_window} for {len(self.depths)} stages"
            )

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)


_TINY = Config(classes=1000)
_SMALL = dataclasses.replace(_TINY, depths=(2, 2, 18, 2), drop_path=0.3)
_BASE = dataclasses.replace(_SMALL, dim=128, heads=4, drop_path=0.5)
_LARGE = dataclasses.replace(_SMALL, dim=192, heads=6)
_WINDOW_16 = {"window": 16}
_PRETRAINED = {"window": 12, "image_px": 192, "drop_path": 0.2}
_12_TO_16 = {"window": 16, "pretrained_window": (12, 12, 12, 6), "drop_path": 0.2}
_12_TO_24 = {"window": 24, "pretrained_window": (12, 12, 12, 6), "drop_path": 0.2, "image_px": 384, "share": 1.0}

# vision.md 6.1: 28,347,154, 49,728,418, 87,918,816 and 196,739,932 parameters; the paper's H, g and G (huge, giant and
# gigantic) 658.0 M, 1,064.6 M and 3,001,912,008. ImageNet-22k: classes=21841. Micro is ours, for studies on CPUs.
PRESETS: Mapping[str, Config] = {
    "swinv2_micro_patch2_window4_32": Config(
        dim=64, depths=(2, 4, 2), heads=2, window=4, patch=2, image_px=32, drop_path=0.0, share=1.0
    ),
    "swinv2_tiny_window8_256": _TINY,
    "swinv2_tiny_window16_256": dataclasses.replace(_TINY, **_WINDOW_16),
    "swinv2_small_window8_256": _SMALL,
    "swinv2_small_window16_256": dataclasses.replace(_SMALL, **_WINDOW_16),
    "swinv2_base_window8_256": _BASE,
    "swinv2_base_window16_256": dataclasses.replace(_BASE, **_WINDOW_16),
    "swinv2_base_window12_192": dataclasses.replace(_BASE, **_PRETRAINED),
    "swinv2_base_window12to16_192to256": dataclasses.replace(_BASE, **_12_TO_16),
    "swinv2_base_window12to24_192to384": dataclasses.replace(_BASE, **_12_TO_24),
    "swinv2_large_window12_192": dataclasses.replace(_LARGE, **_PRETRAINED),
    "swinv2_large_window12to16_192to256": dataclasses.replace(_LARGE, **_12_TO_16),
    "swinv2_large_window12to24_192to384": dataclasses.replace(_LARGE, **_12_TO_24),
    "swinv2_huge_window12_192": dataclasses.replace(_LARGE, dim=352, heads=11, **_PRETRAINED),
    "swinv2_giant_window12_192": dataclasses.replace(_LARGE, dim=448, heads=14, **_PRETRAINED),
    "swinv2_gigantic_window12_192": dataclasses.replace(_LARGE, dim=512, heads=16, depths=(2, 2, 42, 4), **_PRETRAINED),
}


class SwinV2(SwinModel):
    """The encoder, perhaps a classifier."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_swin_v2(
            image_px=config.image_px, patch=config.patch, dim=config.dim, depths=config.depths, heads=config.heads,
            window=config.window, pretrained_window=config.pretrained_window, drop_path=config.drop_path,
        )  # fmt: skip
        if config.classes:
            self.head = Linear(self.encoder.width, config.classes)

    def set_image_size(self, image_px: Size, window: int | None = None) -> None:
        """Choose the windows for pictures of another size, None = of the same side where maps are large enough.
        Nothing is interpolated: biases go on reading offsets in units of the windows they were trained with. Without
        it pictures of any size are read, by the windows there are.
        """
        trained = self.config.pretrained_window or tuple(stage.window for stage in self.encoder.stages)
        self.config = dataclasses.replace(
            self.config, image_px=image_px, window=window or self.config.window, pretrained_window=trained
        )
        self.encoder.set_size(image_px, self.config.window)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of deviation .02, biases 0, norms 1 and 0, but 0 and 0 behind the branches; scales of 10."""
        self.encoder.init_weights()
        if self.config.classes:
            nn.init.normal_(self.head.weight, std=INIT_STD)
            nn.init.zeros_(self.head.bias)


def _official(mlp: str) -> Rules:
    """The encoder as its authors' files have it, where the MLP of offsets goes by this name."""
    return tuple((ours, *(name.replace("cpb_mlp", mlp) for name in theirs)) for ours, *theirs in OFFICIAL)


_HEAD = ("head.{part}", "head.{part}")

LAYOUTS: Mapping[str, WeightMap] = {
    "official": WeightMap(rules=(*under("encoder.", "", OFFICIAL), _HEAD), dropped=BUFFERS),
    "official_rpe": WeightMap(rules=(*under("encoder.", "", _official("rpe_mlp")), _HEAD), dropped=BUFFERS),
    "timm": WeightMap(
        rules=(*under("encoder.", "", OFFICIAL), ("head.{part}", "head.fc.{part}")),
        words=NEXT_STAGE,
        dropped=BUFFERS,
    ),
    "transformers": WeightMap(
        rules=(*under("encoder.", "swinv2.", TRANSFORMERS), ("head.{part}", "classifier.{part}")),
        dropped=BUFFERS,
        prefix="swinv2.",
    ),
}
"""Layouts of published files; ``official_rpe`` is that of SimMIM's and feature distillation's, fine-tuned."""
