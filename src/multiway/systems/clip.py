"""CLIP: learning transferable visual models from natural language supervision (Radford et al., 2021, arXiv 2103.00020).

A tower of pictures, ViT or ResNet, and a causal text tower meet in one space: among all pictures and texts of a step
each picture must find its text, and each text its picture. The objective is `multiway.tasks.retrieval`'s contrast of
pictures and texts; its loss stands in `multiway.objectives.contrastive`.

Where we differ: texts are packed, so nothing is computed for padding, which the original's tokens never see either; a
share of a ViT's patches may be read while training (FLIP, arXiv 2212.00794); stochastic depth may be used (off).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multiway.backbones.dual import DualEncoder, DualModel
from multiway.backbones.pooled_resnet import STRIDE, PooledResNet
from multiway.backbones.text import TextTransformer, build_text
from multiway.backbones.vit import VisionTransformer, build_vit, check_shape
from multiway.errors import ConfigError
from multiway.nn.activation import Activation
from multiway.nn.linear import Linear
from multiway.nn.pixels import CLIP_MEAN, CLIP_STD, HALF, Colour, Size
from multiway.plan import Tokens, dense_tokens
from multiway.weights.layouts import CLIP_BLOCK, OPENAI_BLOCK, packed, under
from multiway.weights.rename import WeightMap

NORM_EPS = 1e-5
MAX_LOGIT_SCALE = math.log(100)
FIRST_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a CLIP.

    ``out``: width of the space both towers meet in. Pictures: ``dim``, ``depth``, ``heads``, ``hidden``, ``patch`` of a
    ViT; with ``stages``, the bottlenecks of its four stages, a ResNet whose stem is ``dim`` wide instead, and ``patch``
    is its stride. Texts: the same with ``text_``; ``text_tokens``: longest text with its two specials. ``activation``:
    belongs to the weights, OpenAI's are ``quick_gelu``; ``drop_path``: rate of the last block of each transformer;
    ``answers``: of a head that answers texts, 0 = none;
    ``mean``, ``std``: of the pixels; ``share``: of the shorter side that evaluation looks at.
    """

    out: int = 512
    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 32
    stages: tuple[int, ...] = ()
    image_px: int | tuple[int, int] = 224
    text_dim: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_hidden: int = 2048
    text_tokens: int = 77
    vocab: int = 49408
    activation: Activation = "quick_gelu"
    drop_path: float = 0.0
    answers: int = 0
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.text_dim % self.text_heads:
            raise ConfigError(f"text_dim {self.text_dim} is not divisible by text_heads {self.text_heads}")
        if not self.stages:
            check_shape("CLIP", self)
        elif len(self.stages) != 4 or self.patch != STRIDE or self.dim % 2:
            raise ConfigError(f"a ResNet has 4 stages, patch {STRIDE} and an even dim, got {self}")


def _text(dim: int, depth: int = 12) -> dict[str, Any]:
    """A published text tower: heads of 64."""
    return {"text_dim": dim, "text_depth": depth, "text_heads": dim // 64, "text_hidden": 4 * dim}


_LARGE: dict[str, Any] = {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096, "patch": 14, "out": 768, **_text(768)}
_RESNETS = {
    "clip_resnet50_224": ((3, 4, 6, 3), 64, 1024, 512),
    "clip_resnet101_224": ((3, 4, 23, 3), 64, 512, 512),
    "clip_resnet50x4_288": ((4, 6, 10, 6), 80, 640, 640),
    "clip_resnet50x16_384": ((6, 8, 18, 8), 96, 768, 768),
    "clip_resnet50x64_448": ((3, 15, 36, 10), 128, 1024, 1024),
}
"""Stages, width of the stem, of the space and of the texts."""

# masked.md 8.1. The nine of OpenAI, with QuickGELU; then open_clip's on LAION-2B, with GELU. Tiny is ours, for CPUs.
PRESETS: Mapping[str, Config] = {
    "clip_vit_tiny_patch8_64": Config(
        out=128, dim=128, depth=3, heads=4, hidden=512, patch=8, image_px=64, text_dim=128, text_depth=3, text_heads=4,
        text_hidden=512, text_tokens=64, vocab=512, activation="gelu", mean=HALF, std=HALF,
    ),
    "clip_vit_base_patch32_224": Config(),
    "clip_vit_base_patch16_224": Config(patch=16),
    "clip_vit_large_patch14_224": Config(**_LARGE),
    "clip_vit_large_patch14_336": Config(**_LARGE, image_px=336),
    **{
        name: Config(dim=dim, stages=stages, patch=STRIDE, image_px=int(name[-3:]), out=out, **_text(text))
        for name, (stages, dim, out, text) in _RESNETS.items()
    },
    "clip_vit_base_patch32_224_laion": Config(activation="gelu"),
    "clip_vit_base_patch16_224_laion": Config(patch=16, activation="gelu"),
    "clip_vit_large_patch14_224_laion": Config(**_LARGE, activation="gelu", mean=HALF, std=HALF),
    "clip_vit_huge_patch14_224_laion": Config(
        dim=1280, depth=32, heads=16, hidden=5120, patch=14, out=1024, **_text(1024, 24), activation="gelu"
    ),
    "clip_vit_giant_patch14_224_laion": Config(
        dim=1408, depth=40, heads=16, hidden=6144, patch=14, out=1024, **_text(1024, 24), activation="gelu"
    ),
    "clip_vit_gigantic_patch14_224_laion": Config(
        dim=1664, depth=48, heads=16, hidden=8192, patch=14, out=1280, **_text(1280, 32), activation="gelu"
    ),
}  # fmt: skip


class Vision(nn.Module):
    """The ViT tower: a norm in front of the blocks, and one of the class token, which is projected."""

    def __init__(self, trunk: VisionTransformer, out: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.first_norm = nn.LayerNorm(trunk.width, eps=NORM_EPS)
        self.norm = nn.LayerNorm(trunk.width, eps=NORM_EPS)
        self.projection = Linear(trunk.width, out, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The ViT's."""
        return self.trunk.blocks

    def forward(self, image: Tensor, keep: Tensor | None = None, draws: Tensor | None = None) -> Tokens:
        """image: float (B, 3, H, W); keep, draws: as `VisionTransformer` -> tokens of the last block."""
        return dense_tokens(self.trunk.run(self.first_norm(self.trunk.tokens(image, keep=keep)), draws))

    def pool(self, tokens: Tokens) -> Tensor:
        """The normed class token: (B, D)."""
        return self.norm(tokens.prefix("image"))

    def set_size(self, size: Size) -> None:
        """Read pictures of another size: antialiased bicubic, as open_clip."""
        self.trunk.set_size(size, antialias=True)

    @torch.no_grad()
    def init_weights(self) -> None:
        """torch's defaults for blocks and patches; class token, positions and projection by width (masked.md 8.1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        for name, parameter in self.trunk.blocks.named_parameters():
            if name.endswith((".attention.qkv.linear.bias", ".attention.out.bias")):
                nn.init.zeros_(parameter)
            elif name.endswith(".attention.qkv.linear.weight"):
                nn.init.xavier_uniform_(parameter)
        for weight in (self.trunk.cls_token, self.trunk.positions, self.projection.weight):
            nn.init.normal_(weight, std=self.trunk.width**-0.5)  # type: ignore[arg-type]


def build_vision(config: Config) -> Vision | PooledResNet:
    """The tower of pictures."""
    if config.stages:
        return PooledResNet(config.image_px, config.dim, config.stages, config.out)
    trunk = build_vit(
        image_px=config.image_px, patch=config.patch, dim=config.dim, depth=config.depth, heads=config.heads,
        hidden=config.hidden, drop_path=config.drop_path, eps=NORM_EPS, patch_bias=False, activation=config.activation,
    )  # fmt: skip
    return Vision(trunk, config.out)


def build_language(config: Config) -> TextTransformer:
    """The tower of texts."""
    return build_text(
        vocab=config.vocab, longest=config.text_tokens, dim=config.text_dim, depth=config.text_depth,
        heads=config.text_heads, hidden=config.text_hidden, out=config.out, drop_path=config.drop_path, eps=NORM_EPS,
        activation=config.activation,
    )  # fmt: skip


class CLIP(DualModel):
    """Both towers and the temperature."""

    accepts: ClassVar[frozenset[frozenset[str]]] = frozenset({frozenset({"image"}), frozenset({"text"})})
    causal: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = DualEncoder(build_vision(config), build_language(config))
        self.logit_scale = nn.Parameter(torch.full((1,), FIRST_LOGIT_SCALE))
        if config.answers:
            self.answer_head = Linear(config.text_dim, config.answers)

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Keep the factor on cosines within 1 and 100; called after every step (open_clip; the paper: at most 100)."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Each tower its own way; cosines are multiplied by 1/.07 at first."""
        self.encoder.vision.init_weights()
        self.encoder.language.init_weights()
        nn.init.constant_(self.logit_scale, FIRST_LOGIT_SCALE)
        if self.config.answers:
            nn.init.normal_(self.answer_head.weight, std=0.02)
            nn.init.zeros_(self.answer_head.bias)


_TRUNK, _LANGUAGE = "encoder.vision.trunk.", "encoder.language."
_SQUEEZED = ("logit_scale", _TRUNK + "cls_token")
_RESNET = (
    ("stem.{n}.0.{part}", "conv{n}.{part}"),
    ("stem.{n}.1.{part}", "bn{n}.{part}"),
    ("stages.{n}.{block}.conv{k}.0.{part}", "layer{n}.{block}.conv{k}.{part}"),
    ("stages.{n}.{block}.conv{k}.1.{part}", "layer{n}.{block}.bn{k}.{part}"),
    ("stages.{n}.{block}.shortcut.{i}.{part}", "layer{n}.{block}.downsample.{i}.{part}"),
    ("positions", "attnpool.positional_embedding"),
    ("attention.qkv.{part}", *(f"attnpool.{name}_proj." + "{part}" for name in "qkv")),
    ("attention.out.{part}", "attnpool.c_proj.{part}"),
)
_OPENAI = WeightMap(
    rules=(
        (_TRUNK + "cls_token", "visual.class_embedding"),
        (_TRUNK + "positions", "visual.positional_embedding"),
        (_TRUNK + "embed.{part}", "visual.conv1.{part}"),
        *under(_TRUNK + "blocks.{layer}.", "visual.transformer.resblocks.{layer}.", OPENAI_BLOCK),
        ("encoder.vision.first_norm.{part}", "visual.ln_pre.{part}"),
        ("encoder.vision.norm.{part}", "visual.ln_post.{part}"),
        ("encoder.vision.projection.weight", "visual.proj"),
        *under("encoder.vision.", "visual.", _RESNET),
        (_LANGUAGE + "words.{part}", "token_embedding.{part}"),
        (_LANGUAGE + "positions", "positional_embedding"),
        *under(_LANGUAGE + "blocks.{layer}.", "transformer.resblocks.{layer}.", packed(OPENAI_BLOCK)),
        (_LANGUAGE + "norm.experts.shared.{part}", "ln_final.{part}"),
        (_LANGUAGE + "projection.weight", "text_projection"),
        ("logit_scale", "logit_scale"),
    ),
    words={"n": {"0": "1", "1": "2", "2": "3", "3": "4"}},
    squeezed=_SQUEEZED,
    transposed=("encoder.vision.projection.weight", "encoder.language.projection.weight"),
    dropped=("attn_mask", "{block*}.attn_mask"),
)

LAYOUTS: Mapping[str, WeightMap] = {
    "openai": dataclasses.replace(
        _OPENAI,
        dropped=("input_resolution", "context_length", "vocab_size", *_OPENAI.dropped),
        config={"activation": "quick_gelu"},
    ),
    "open_clip": dataclasses.replace(_OPENAI, config={"activation": "gelu"}),
    "transformers": WeightMap(
        rules=(
            (_TRUNK + "cls_token", "vision_model.embeddings.class_embedding"),
            (_TRUNK + "positions", "vision_model.embeddings.position_embedding.weight"),
            (_TRUNK + "embed.{part}", "vision_model.embeddings.patch_embedding.{part}"),
            *under(_TRUNK + "blocks.{layer}.", "vision_model.encoder.layers.{layer}.", CLIP_BLOCK),
            ("encoder.vision.first_norm.{part}", "vision_model.pre_layrnorm.{part}"),
            ("encoder.vision.norm.{part}", "vision_model.post_layernorm.{part}"),
            ("encoder.vision.projection.{part}", "visual_projection.{part}"),
            (_LANGUAGE + "words.{part}", "text_model.embeddings.token_embedding.{part}"),
            (_LANGUAGE + "positions", "text_model.embeddings.position_embedding.weight"),
            *under(_LANGUAGE + "blocks.{layer}.", "text_model.encoder.layers.{layer}.", packed(CLIP_BLOCK)),
            (_LANGUAGE + "norm.experts.shared.{part}", "text_model.final_layer_norm.{part}"),
            (_LANGUAGE + "projection.{part}", "text_projection.{part}"),
            ("logit_scale", "logit_scale"),
        ),
        squeezed=_SQUEEZED,
        dropped=("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
    ),
}
"""Names in the files of OpenAI, of open_clip (the same, but its weights on LAION-2B and DataComp mean GELU; those of
its tags laion400m, metaclip, dfn, yfcc15m and cc12m mean QuickGELU: take OpenAI's layout), and of the hub.
"""
