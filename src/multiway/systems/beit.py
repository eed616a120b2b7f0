"""BEiT: BERT pre-training of image transformers (Bao et al., 2021, arXiv 2106.08254).

Patches are hidden in blocks, and their visual tokens, given by a frozen image tokenizer, are predicted. All layers
share one relative position bias while pre-training; fine-tuning gives every layer its own copy and classifies from the
normed mean of the patches.

Where we differ: visual tokens come from any `ImageTokenizer` (mean patches, VQ-KD; the paper's is
`multiway.backbones.dvae`), or are stored with the data. The two first weights and the two colour normalisations that
are both called official follow from the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multiway.backbones.image import ImageModel
from multiway.backbones.vit import build_vit, check_shape
from multiway.errors import ConfigError
from multiway.nn.initial import init_cut_normal, rescale_by_depth
from multiway.nn.linear import Linear
from multiway.nn.pixels import HALF, IMAGENET_MEAN, IMAGENET_STD, Colour, Size
from multiway.nn.quantize import ImageTokenizer
from multiway.objectives.masked import masked_cross_entropy
from multiway.plan import Tokens, dense_tokens
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.layouts import BEIT_BLOCK, TIMM_STEM, TRANSFORMERS_BLOCK, TRANSFORMERS_STEM, under
from multiway.weights.rename import WeightMap

NORM_EPS = 1e-6
STD = 0.02
"""Deviation of first weights."""
CLASSIFIER_SCALE = 1e-3
"""Of a classifier's first weights."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a BEiT, to be pre-trained (``codes``) or tuned (``classes``).

    ``hidden``: width inside the FFNs; ``image_px``: side, or height and width; ``drop_path``: rate of the last block;
    ``bias``: relative position bias, one for all layers, one each, or none; ``positions``: added to the patches;
    ``layer_scale``: first value of the factors on branches, 0 = no factors; ``codes``: visual vocabulary of the masked
    head, 0 = none; ``classes``: of the classifier, 0 = none; ``pool``: what it reads; ``mean``, ``std``: of the pixels;
    ``share``: of the shorter side that evaluation looks at.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    drop_path: float = 0.0
    bias: Literal["shared", "layer", "none"] = "layer"
    positions: Literal["learned", "none"] = "none"
    layer_scale: float = 0.1
    codes: int = 0
    classes: int = 0
    pool: Literal["mean", "cls"] = "mean"
    mean: Colour = HALF
    std: Colour = HALF
    share: float = 224 / 256

    def __post_init__(self) -> None:
        check_shape("BEiT", self)
        if self.codes and self.classes:
            raise ConfigError(
                f"a BEiT predicts {self.codes} codes or {self.classes} classes, not both: set codes or classes to 0"
            )

    @property
    def norms_tokens(self) -> bool:
        """Whether every token is normed at the end; otherwise the mean of the patches is."""
        return bool(self.codes) or self.pool == "cls"


_SIZES: Mapping[str, dict[str, Any]] = {
    "base": {},
    "large": {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096, "layer_scale": 1e-5},
}
_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_PRETRAINING: dict[str, Any] = {"bias": "shared", "codes": 8192, "drop_path": 0.1}

# masked.md 2.1, 2.2, 2.4, named as the published files; "pt" are models to be pre-trained, "beit2" BEiT-2's
# classifiers. Micro is ours, for studies on CPUs.
PRESETS: Mapping[str, Config] = {
    "beit_micro_patch4_32_pt": Config(
        dim=192, depth=6, heads=3, hidden=768, patch=4, image_px=32, share=1.0, bias="shared", codes=512
    ),
    "beit_micro_patch4_32": Config(dim=192, depth=6, heads=3, hidden=768, patch=4, image_px=32, share=1.0),
    **{f"beit_{name}_patch16_224_pt22k": Config(**shape, **_PRETRAINING) for name, shape in _SIZES.items()},
    "beit_base_patch16_224_pt1k_800ep": Config(
        **_IMAGENET, bias="none", positions="learned", layer_scale=0.0, codes=8192, drop_path=0.1
    ),
    **{f"beit_{name}_patch16_224": Config(**shape, classes=1000) for name, shape in _SIZES.items()},
    **{f"beit_{name}_patch16_224_ft22k": Config(**shape, classes=21841) for name, shape in _SIZES.items()},
    **{
        f"beit_{name}_patch16_{px}": Config(**_SIZES[name], image_px=px, share=1.0, classes=1000)
        for name, px in (("base", 384), ("large", 384), ("large", 512))
    },
    **{f"beit2_{name}_patch16_224": Config(**shape, **_IMAGENET, classes=1000) for name, shape in _SIZES.items()},
    **{
        f"beit2_{name}_patch16_224_ft21k": Config(**shape, **_IMAGENET, classes=21841) for name, shape in _SIZES.items()
    },
}


class BEiT(ImageModel):
    """The encoder with the norm and the head its config asks for."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_vit(
            image_px=config.image_px, patch=config.patch, dim=config.dim, depth=config.depth, heads=config.heads,
            hidden=config.hidden, drop_path=config.drop_path, eps=NORM_EPS, positions=config.positions,
            bias=config.bias, key_bias=False, layer_scale=config.layer_scale, hide_token=bool(config.codes),
        )  # fmt: skip
        if config.norms_tokens:
            self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        else:
            self.fc_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        if config.codes:
            self.mim_head = Linear(config.dim, config.codes)
        if config.classes:
            self.head = Linear(config.dim, config.classes)

    def encode(self, *, image: Tensor, draws: Tensor | None = None) -> Tokens:
        """Tokens after the final norm; of models that norm the mean of the patches instead, before it."""
        x = self.encoder(self.pixels(image), draws=draws)
        return dense_tokens(self.norm(x) if self.config.norms_tokens else x)

    def pool(self, tokens: Tokens) -> Tensor:
        """The normed mean of the patches, or the class token: (B, D)."""
        if self.config.pool == "cls":
            return tokens.prefix("image")
        mean = tokens.mean("image", skip=1)
        return mean if self.config.norms_tokens else self.fc_norm(mean)

    def code_logits(self, places: Tensor) -> Tensor:
        """Scores of all visual tokens at places of the encoder's output: (M, D) -> (M, codes)."""
        return self.mim_head(self.norm(places))

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size from now on; relative biases are resized geometrically, positions bicubically
        (masked.md 1.3, 1.4).
        """
        self.encoder.set_size(image_px, antialias=False)
        self.config = dataclasses.replace(self.config, image_px=image_px)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normals of deviation .02, branches divided by sqrt(2 l) in block l (masked.md 2.1).

        For pre-training they are cut at one deviation; for tuning not at all, the patch embedding starts as torch's
        convolutions do, and the classifier almost at zero.
        """
        init_cut_normal(self.encoder, STD, self.config.layer_scale)
        if self.config.norms_tokens:
            self.norm.reset_parameters()
        else:
            self.fc_norm.reset_parameters()
        if self.config.codes:
            for weight in (self.mim_head.weight, self.encoder.positions):
                if weight is not None:
                    nn.init.trunc_normal_(weight, std=STD, a=-STD, b=STD)
            nn.init.zeros_(self.mim_head.bias)
            return
        for name, parameter in self.encoder.named_parameters():
            if parameter.ndim > 1 and not name.endswith("bias.table"):
                nn.init.normal_(parameter, std=STD)
        rescale_by_depth(self.encoder.blocks)
        self.encoder.embed.reset_parameters()
        if self.config.classes:
            nn.init.normal_(self.head.weight, std=STD * CLASSIFIER_SCALE)
            nn.init.zeros_(self.head.bias)


class MaskedImageModeling(Objective):
    """Cross-entropy of the visual tokens of hidden patches.

    ``tokenizer``: image -> codes, asked when the batch carries none, or None; a network goes into `Frozen` first.
    Batches carry ``image``, ``image_hide`` and ``image_hidden``, perhaps ``image_code`` and ``drop_path``. Term:
    ``image``, the hidden patches, with its accuracy. Source: masked.md 2.2.
    """

    def __init__(self, model: BEiT, tokenizer: ImageTokenizer | None) -> None:
        super().__init__()
        if not model.config.codes:
            raise ConfigError(
                "masked image modelling predicts visual tokens: set model.codes to the tokenizer's number"
            )
        self.model = model
        self.tokenizer = tokenizer

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches."""
        return {"image": len(batch["image_hidden"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Encode the pictures with patches hidden; predict the codes at the hidden patches alone."""
        model, hidden = self.model, batch["image_hidden"]
        x = model.encoder(model.pixels(batch["image"]), hide=batch["image_hide"], draws=batch.get("drop_path"))
        patches = x[:, 1:].flatten(0, 1)
        losses, hits = masked_cross_entropy(
            lambda places: model.code_logits(patches.index_select(0, places)),
            hidden, self.codes(batch).flatten()[hidden], model.config.codes,
        )  # fmt: skip
        loss = losses.sum()
        return StepOutput(loss / max(1.0, counts["image"]), {"image": loss.detach(), "image/accuracy": hits.sum()})

    def codes(self, batch: Batch) -> Tensor:
        """Visual tokens of every patch, int64 (B, P): the stored ones, else the tokenizer's."""
        if "image_code" in batch:
            return batch["image_code"]
        if self.tokenizer is None:
            raise ConfigError("masked image modelling needs an image tokenizer, or codes stored with the data")
        return self.tokenizer(batch["image"])


_OFFICIAL = WeightMap(
    rules=(
        *under("encoder.", "", TIMM_STEM),
        ("encoder.hide_token", "mask_token"),
        ("encoder.bias.table", "rel_pos_bias.relative_position_bias_table"),
        *under("encoder.blocks.{layer}.", "blocks.{layer}.", BEIT_BLOCK),
        ("norm.{part}", "norm.{part}"),
        ("fc_norm.{part}", "fc_norm.{part}"),
        ("mim_head.{part}", "lm_head.{part}"),
        ("head.{part}", "head.{part}"),
    ),
    ones={"encoder.positions": -1},
    dropped=("rel_pos_bias.relative_position_index", "blocks.{layer}.attn.relative_position_index"),
)

_TRANSFORMERS = WeightMap(
    rules=(
        *under("encoder.", "beit.", TRANSFORMERS_STEM),
        ("encoder.bias.table", "beit.encoder.relative_position_bias.relative_position_bias_table"),
        *under("encoder.blocks.{layer}.", "beit.encoder.layer.{layer}.", TRANSFORMERS_BLOCK),
        ("norm.{part}", "layernorm.{part}"),
        ("fc_norm.{part}", "beit.pooler.layernorm.{part}"),
        ("mim_head.{part}", "lm_head.{part}"),
        ("head.{part}", "classifier.{part}"),
    ),
    ones={"encoder.positions": -1},
    dropped=("beit.encoder.{place*}.relative_position_index",),
    prefix="beit.",
)

LAYOUTS: Mapping[str, WeightMap] = {"official": _OFFICIAL, "timm": _OFFICIAL, "transformers": _TRANSFORMERS}
"""Layouts of published files: the repositories' (of BEiT-2 the classifiers), timm's, the hub's (transformers 4)."""
