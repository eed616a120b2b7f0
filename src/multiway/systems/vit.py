"""ViT: an image is worth 16x16 words (Dosovitskiy et al., 2020, arXiv 2010.11929).

Patches become vectors, a class token goes in front, positions are added; pre-norm blocks of global attention; a final
norm; the class is read from the class token. With ``pool="mean"`` it is read from the normed mean of the patches
instead, which is how MAE's weights are fine-tuned.

Where we differ: pictures of other sizes are read after `ViT.set_image_size`, not in training only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from multiway.backbones.image import ImageModel
from multiway.backbones.vit import build_vit, check_shape
from multiway.nn.linear import Linear
from multiway.nn.pixels import HALF, IMAGENET_MEAN, IMAGENET_STD, Colour, Size
from multiway.plan import Tokens, dense_tokens
from multiway.weights.layouts import TIMM_BLOCK, TIMM_STEM, TRANSFORMERS_BLOCK, TRANSFORMERS_STEM, under
from multiway.weights.rename import WeightMap

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a ViT.

    ``hidden``: width inside the FFNs; ``image_px``: side, or height and width; ``drop_path``: rate of the last block;
    ``classes``: of the classifier, 0 = none; ``pool``: what it reads; ``mean``, ``std``: of the pixels; ``share``: of
    the shorter side that evaluation looks at; ``head_std``: deviation of the classifier's first weights.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    drop_path: float = 0.0
    classes: int = 0
    pool: Literal["cls", "mean"] = "cls"
    mean: Colour = HALF
    std: Colour = HALF
    share: float = 0.9
    head_std: float = 0.02

    def __post_init__(self) -> None:
        check_shape("ViT", self)


# vision.md 3.1; pixels and share as the AugReg checkpoints. Tiny32 is ours, for tests and studies on CPUs.
PRESETS: Mapping[str, Config] = {
    "vit_micro_patch4_32": Config(dim=192, depth=6, heads=3, hidden=768, patch=4, image_px=32, share=1.0),
    "vit_tiny_patch16_224": Config(dim=192, heads=3, hidden=768, classes=1000),
    "vit_small_patch16_224": Config(dim=384, heads=6, hidden=1536, classes=1000),
    "vit_base_patch32_224": Config(patch=32, classes=1000),
    "vit_base_patch16_224": Config(classes=1000),
    "vit_base_patch16_384": Config(image_px=384, share=1.0, classes=1000),
    "vit_base_patch8_224": Config(patch=8, classes=1000),
    "vit_large_patch16_224": Config(dim=1024, depth=24, heads=16, hidden=4096, classes=1000),
    "vit_large_patch16_384": Config(dim=1024, depth=24, heads=16, hidden=4096, image_px=384, share=1.0, classes=1000),
    "vit_large_patch14_224": Config(dim=1024, depth=24, heads=16, hidden=4096, patch=14, classes=1000),
    "vit_huge_patch14_224": Config(dim=1280, depth=32, heads=16, hidden=5120, patch=14, classes=1000),
    "vit_g_patch14_224": Config(dim=1408, depth=40, heads=16, hidden=6144, patch=14, classes=1000),
    "vit_gigantic_patch14_224": Config(dim=1664, depth=48, heads=16, hidden=8192, patch=14, classes=1000),
    # Fine-tuned from MAE (vision.md 4.3): the mean of the patches, ImageNet's colours, an almost zero classifier.
    **{
        f"vit_{name}_mean": Config(
            **shape, pool="mean", mean=IMAGENET_MEAN, std=IMAGENET_STD, share=224 / 256, head_std=2e-5, classes=1000
        )
        for name, shape in {
            "base_patch16_224": {},
            "large_patch16_224": {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096},
            "huge_patch14_224": {"dim": 1280, "depth": 32, "heads": 16, "hidden": 5120, "patch": 14},
        }.items()
    },
}


class ViT(ImageModel):
    """The encoder, its final norm, perhaps a classifier."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_vit(
            image_px=config.image_px, patch=config.patch, dim=config.dim, depth=config.depth, heads=config.heads,
            hidden=config.hidden, drop_path=config.drop_path, eps=NORM_EPS,
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        if config.classes:
            self.head = Linear(config.dim, config.classes)

    def encode(self, *, image: Tensor, draws: Tensor | None = None) -> Tokens:
        """Tokens after the final norm; with ``pool="mean"`` before it, because the mean is normed."""
        x = self.encoder(self.pixels(image), draws=draws)
        return dense_tokens(self.norm(x) if self.config.pool == "cls" else x)

    def pool(self, tokens: Tokens) -> Tensor:
        """The class token, or the normed mean of the patches: (B, D)."""
        if self.config.pool == "cls":
            return tokens.prefix("image")
        return self.norm(tokens.mean("image", skip=1))

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size from now on; positions are resized as timm does it (antialiased bicubic) with
        ``pool="cls"``, as MAE does it (plain bicubic) with ``"mean"``.
        """
        self.encoder.set_size(image_px, antialias=self.config.pool == "cls")
        self.config = dataclasses.replace(self.config, image_px=image_px)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of deviation .02, biases 0, norms 1 and 0 (timm's default: cut at 100 deviations, that is not
        at all).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.encoder.positions, std=0.02)  # type: ignore[arg-type]
        nn.init.normal_(self.encoder.cls_token, std=1e-6)
        if self.config.classes:
            nn.init.normal_(self.head.weight, std=self.config.head_std)


_BLOCK = "encoder.blocks.{layer}."

LAYOUTS: Mapping[str, WeightMap] = {
    "timm": WeightMap(
        rules=(
            *under("encoder.", "", TIMM_STEM),
            *under(_BLOCK, "blocks.{layer}.", TIMM_BLOCK),
            ("norm.{part}", "norm.{part}"),
            ("head.{part}", "head.{part}"),
        ),
        ones={"encoder.positions": -1},
        config={"pool": "cls"},
    ),
    "mae": WeightMap(  # fine-tuned: the norm of the mean has its own name
        rules=(
            *under("encoder.", "", TIMM_STEM),
            *under(_BLOCK, "blocks.{layer}.", TIMM_BLOCK),
            ("norm.{part}", "fc_norm.{part}"),
            ("head.{part}", "head.{part}"),
        ),
        ones={"encoder.positions": -1},
        config={"pool": "mean"},
    ),
    "transformers": WeightMap(
        rules=(
            *under("encoder.", "vit.", TRANSFORMERS_STEM),
            *under(_BLOCK, "vit.encoder.layer.{layer}.", TRANSFORMERS_BLOCK),
            ("norm.{part}", "vit.layernorm.{part}"),
            ("head.{part}", "classifier.{part}"),
        ),
        ones={"encoder.positions": -1},
        dropped=("vit.pooler.{part*}",),
        prefix="vit.",
        config={"pool": "cls"},
    ),
}
"""Layouts of published files; Google's npz is read as timm's (`multiway.weights.google`)."""
