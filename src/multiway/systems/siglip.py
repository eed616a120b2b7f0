"""SigLIP: sigmoid loss for language-image pre-training (Zhai et al., 2023, arXiv 2303.15343).

Two towers as CLIP's, but every pair of a picture and a text is a question of its own: do they belong together? The
score is a cosine times a learned factor plus a learned bias; the objective is
`multiway.tasks.retrieval.ImageTextSigmoid`. The tower of pictures has no class token, a learned query looks at all
patches instead; the tower of texts is not causal, and reads every text filled to one length with end tokens, of which
the last is its feature. So texts cannot be packed here: what looks like padding takes part.

Where we differ: a share of the patches may be read while training (FLIP); stochastic depth may be used (off).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multiway.backbones.dual import DualEncoder, DualModel
from multiway.backbones.vit import VisionTransformer, build_block, build_vit, check_shape
from multiway.errors import ConfigError
from multiway.nn.activation import Activation
from multiway.nn.ffn import FeedForward
from multiway.nn.linear import Linear
from multiway.nn.pixels import HALF, Colour, Size
from multiway.nn.pool import AttentionPool
from multiway.plan import Plan, Tokens, dense_tokens
from multiway.weights.layouts import CLIP_BLOCK, under
from multiway.weights.rename import WeightMap

NORM_EPS = 1e-6
ACTIVATION: Activation = "gelu_tanh"
FIRST_LOGIT_SCALE, FIRST_LOGIT_BIAS = math.log(10), -10.0
"""Of cosines at first: almost all pairs are none (the paper, 3.1)."""
BIAS_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a SigLIP.

    ``dim``, ``depth``, ``heads``, ``hidden``: of both towers, which meet in their own width; ``text_tokens``: length of
    every text, filled with the id ``fill``; ``drop_path``: rate of the last block of each tower; ``mean``, ``std``: of
    the pixels.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    text_tokens: int = 64
    vocab: int = 32000
    answers: int = 0
    fill: int = 1
    drop_path: float = 0.0
    mean: Colour = HALF
    std: Colour = HALF

    def __post_init__(self) -> None:
        check_shape("SigLIP", self)


_LARGE: dict[str, Any] = {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096}
_SO400M: dict[str, Any] = {"dim": 1152, "depth": 27, "heads": 16, "hidden": 4304, "patch": 14}

# The released sizes on English WebLI. Tiny is ours, for CPUs.
PRESETS: Mapping[str, Config] = {
    "siglip_tiny_patch8_64": Config(
        dim=128, depth=3, heads=4, hidden=512, patch=8, image_px=64, text_tokens=32, vocab=512
    ),
    "siglip_base_patch16_224": Config(),
    "siglip_base_patch16_256": Config(image_px=256),
    "siglip_base_patch16_384": Config(image_px=384),
    "siglip_base_patch16_512": Config(image_px=512),
    "siglip_large_patch16_256": Config(**_LARGE, image_px=256),
    "siglip_large_patch16_384": Config(**_LARGE, image_px=384),
    "siglip_so400m_patch14_224": Config(**_SO400M, text_tokens=16),
    "siglip_so400m_patch14_384": Config(**_SO400M, image_px=384 // 14 * 14),
}


class Vision(nn.Module):
    """The tower of pictures: a ViT without class token, its norm, and attention of one learned query."""

    def __init__(self, trunk: VisionTransformer, heads: int, hidden: int) -> None:
        super().__init__()
        dim = trunk.width
        self.trunk = trunk
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = AttentionPool(dim, heads, dim)
        norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ffn = FeedForward(norm, Linear(dim, hidden), nn.Identity(), Linear(hidden, dim), ACTIVATION)
        self.projection = nn.Identity()

    @property
    def blocks(self) -> nn.ModuleList:
        """The ViT's."""
        return self.trunk.blocks

    def forward(self, image: Tensor, keep: Tensor | None = None, draws: Tensor | None = None) -> Tokens:
        """image: float (B, 3, H, W); keep, draws: as `VisionTransformer` -> normed patches."""
        return dense_tokens(self.norm(self.trunk(image, keep=keep, draws=draws)))

    def pool(self, tokens: Tokens) -> Tensor:
        """What the query finds: (B, D)."""
        x = self.attention(self.probe[0], tokens.dense("image")[0])
        return x + self.ffn(x)

    def set_size(self, size: Size) -> None:
        """Read pictures of another size: plain bicubic, as transformers."""
        self.trunk.set_size(size, antialias=False)


class Language(nn.Module):
    """The tower of texts, all of one length, each token seeing all others; ``projection`` is of the last one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fill = config.fill
        self.words = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Parameter(torch.zeros(config.text_tokens, config.dim))
        self.blocks = nn.ModuleList(
            build_block(
                dim=config.dim, heads=config.heads, hidden=config.hidden, eps=NORM_EPS, activation=ACTIVATION,
                drop_rate=config.drop_path * i / max(1, config.depth - 1),
            )
            for i in range(config.depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.projection = Linear(config.dim, config.dim)

    def forward(self, ids: Tensor, plan: Plan, draws: Tensor | None = None) -> Tokens:
        """ids: int64 (R,); plan: of texts alone; draws: (2 L, B) for stochastic depth -> tokens, the filled ones too.

        Raises ConfigError for a text longer than the positions.
        """
        length = max(group.length for group in plan.groups)
        if length > len(self.positions):
            raise ConfigError(f"a text has {length} tokens, this model reads at most {len(self.positions)}")
        filled = ids.new_full((plan.samples, len(self.positions)), self.fill)
        x = self.words(filled.index_put((plan.sample, plan.position), ids)) + self.positions
        for i, block in enumerate(self.blocks):
            x = block(x, None if draws is None else draws[2 * i : 2 * i + 2])
        return dense_tokens(self.norm(x), "text")

    def pool(self, tokens: Tokens) -> Tensor:
        """The last token of every text, in most a filled one: (B, D)."""
        return tokens.dense("text")[0][:, -1]


class SigLIP(DualModel):
    """Both towers, the factor and the bias of scores."""

    accepts: ClassVar[frozenset[frozenset[str]]] = frozenset({frozenset({"image"}), frozenset({"text"})})

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        trunk = build_vit(
            image_px=config.image_px, patch=config.patch, dim=config.dim, depth=config.depth, heads=config.heads,
            hidden=config.hidden, drop_path=config.drop_path, eps=NORM_EPS, class_token=False, activation=ACTIVATION,
        )  # fmt: skip
        self.encoder = DualEncoder(Vision(trunk, config.heads, config.hidden), Language(config))
        self.logit_scale = nn.Parameter(torch.full((1,), FIRST_LOGIT_SCALE))
        self.logit_bias = nn.Parameter(torch.full((1,), FIRST_LOGIT_BIAS))
        if config.answers:
            self.answer_head = Linear(config.dim, config.answers)

    def bias(self) -> Tensor:
        """What is added to scores, learned: (1,)."""
        return self.logit_bias

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier's uniform weights in blocks, tables and patches by width (big_vision); score 10 cos - 10 at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.fc1.bias, std=BIAS_STD)
                nn.init.normal_(module.fc2.bias, std=BIAS_STD)
        vision, language, width = self.encoder.vision, self.encoder.language, self.config.dim
        nn.init.normal_(vision.trunk.embed.weight, std=vision.trunk.embed.weight[0].numel() ** -0.5)
        nn.init.zeros_(vision.trunk.embed.bias)
        nn.init.xavier_uniform_(vision.probe)
        nn.init.normal_(language.projection.weight, std=width**-0.5)
        for table in (vision.trunk.positions, language.positions, language.words.weight):
            nn.init.normal_(table, std=width**-0.5)
        nn.init.constant_(self.logit_scale, FIRST_LOGIT_SCALE)
        nn.init.constant_(self.logit_bias, FIRST_LOGIT_BIAS)


_TRUNK, _LANGUAGE = "encoder.vision.trunk.", "encoder.language."

LAYOUTS: Mapping[str, WeightMap] = {
    "transformers": WeightMap(
        rules=(
            (_TRUNK + "positions", "vision_model.embeddings.position_embedding.weight"),
            (_TRUNK + "embed.{part}", "vision_model.embeddings.patch_embedding.{part}"),
            *under(_TRUNK + "blocks.{layer}.", "vision_model.encoder.layers.{layer}.", CLIP_BLOCK),
            ("encoder.vision.norm.{part}", "vision_model.post_layernorm.{part}"),
            ("encoder.vision.probe", "vision_model.head.probe"),
            ("encoder.vision.attention.qkv.{part}", "vision_model.head.attention.in_proj_{part}"),
            ("encoder.vision.attention.out.{part}", "vision_model.head.attention.out_proj.{part}"),
            ("encoder.vision.ffn.norm.{part}", "vision_model.head.layernorm.{part}"),
            ("encoder.vision.ffn.{name}.{part}", "vision_model.head.mlp.{name}.{part}"),
            (_LANGUAGE + "words.{part}", "text_model.embeddings.token_embedding.{part}"),
            (_LANGUAGE + "positions", "text_model.embeddings.position_embedding.weight"),
            *under(_LANGUAGE + "blocks.{layer}.", "text_model.encoder.layers.{layer}.", CLIP_BLOCK),
            (_LANGUAGE + "norm.{part}", "text_model.final_layer_norm.{part}"),
            (_LANGUAGE + "projection.{part}", "text_model.head.{part}"),
            ("logit_scale", "logit_scale"),
            ("logit_bias", "logit_bias"),
        ),
        dropped=("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
    ),
}
"""Names in the files of the hub."""
