"""BEiT v2: masked image modeling with vector-quantized visual tokenizers (Peng et al., 2022, arXiv 2208.06366).

BEiT, with VQ-KD's visual tokens (`multiway.systems.vq_kd`) and a second task that makes the class token gather what
the patches know: a shallow head reads the last layer's class token with an early layer's patches, and predicts the same
codes by the same norm and linear map. Fine-tuning drops the head and is BEiT's (`multiway.systems.beit`).

As in the released code, the head's linear maps start as torch's do, not as the others (it is made after they were
initialised), and are divided by sqrt(2 l) all the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multiway.backbones.image import ImageModel
from multiway.backbones.vit import build_block, build_vit, check_shape
from multiway.errors import ConfigError
from multiway.nn.initial import init_cut_normal
from multiway.nn.linear import Linear, QueryKeyValue
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD, Colour, Size
from multiway.nn.quantize import ImageTokenizer
from multiway.objectives.masked import masked_cross_entropy
from multiway.plan import Tokens, dense_tokens
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.layouts import BEIT_BLOCK, TIMM_STEM, under
from multiway.weights.rename import WeightMap

NORM_EPS = 1e-6
STD = 0.02
"""Deviation of first weights, cut at one deviation."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a BEiT-2 that is pre-trained.

    ``depth``: blocks of the backbone; ``early_layer``: after how many of them the head takes the patches;
    ``head_layers``: blocks of the head; the rest as BEiT's.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    drop_path: float = 0.1
    layer_scale: float = 0.1
    codes: int = 8192
    early_layer: int = 9
    head_layers: int = 2
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    share: float = 224 / 256
    classes: int = 0

    def __post_init__(self) -> None:
        check_shape("BEiT-2", self)
        if not 0 < self.early_layer < self.depth:
            raise ConfigError(f"early_layer is a block before the last, 1 to {self.depth - 1}, got {self.early_layer}")


# masked.md 4.1: 106,143,056 and 336,728,512 parameters, named as the published files. Micro is ours, for studies on
# CPUs.
PRESETS: Mapping[str, Config] = {
    "beit2_micro_patch4_32_pt": Config(
        dim=192, depth=6, heads=3, hidden=768, patch=4, image_px=32, drop_path=0.0, codes=512, early_layer=4,
        share=1.0,
    ),
    "beit2_base_patch16_224_pt1k": Config(),
    "beit2_large_patch16_224_pt1k": Config(
        dim=1024, depth=24, heads=16, hidden=4096, layer_scale=1e-5, early_layer=21
    ),
}  # fmt: skip


class BEiT2(ImageModel):
    """BEiT's encoder, norm and masked head, and the blocks that aggregate patches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        shape: dict[str, Any] = {
            "dim": config.dim, "heads": config.heads, "hidden": config.hidden, "eps": NORM_EPS, "key_bias": False,
            "layer_scale": config.layer_scale,
        }  # fmt: skip
        self.encoder = build_vit(
            image_px=config.image_px, patch=config.patch, depth=config.depth, drop_path=config.drop_path,
            positions="none", bias="shared", hide_token=True, **shape,
        )  # fmt: skip
        rise = config.drop_path / (max(config.depth, config.early_layer + config.head_layers) - 1)
        self.aggregation = nn.ModuleList(
            build_block(drop_rate=rise * (config.early_layer + i), **shape) for i in range(config.head_layers)
        )
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.mim_head = Linear(config.dim, config.codes)

    @property
    def layers(self) -> int:
        """Number of blocks, the head's as well."""
        return self.config.depth + self.config.head_layers

    def forward(self, image: Tensor, hide: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches after the last block, and after the head: (B, P, D) each.

        image: uint8 or normalised (B, 3, H, W); hide: bool (B, P), True = hidden; draws: (2 (L + head_layers), B) for
        stochastic depth, None = nothing dropped.
        """
        encoder, early, depth = self.encoder, self.config.early_layer, self.config.depth
        first = encoder.run(encoder.tokens(self.pixels(image), hide), draws, slice(early))
        last = encoder.run(first, draws, slice(early, None))
        x, bias = torch.cat([last[:, :1], first[:, 1:]], dim=1), encoder.bias()
        for i, block in enumerate(self.aggregation, depth):
            x = block(x, None if draws is None else draws[2 * i : 2 * i + 2], bias)
        return last[:, 1:], x[:, 1:]

    def encode(self, *, image: Tensor, draws: Tensor | None = None) -> Tokens:
        """Tokens after the final norm, without the head."""
        return dense_tokens(self.norm(self.encoder(self.pixels(image), draws=draws)))

    def pool(self, tokens: Tokens) -> Tensor:
        """The class token: (B, D)."""
        return tokens.prefix("image")

    def code_logits(self, places: Tensor) -> Tensor:
        """Scores of all visual tokens at places of `forward`'s patches: (M, D) -> (M, codes)."""
        return self.mim_head(self.norm(places))

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size from now on; relative biases are resized geometrically."""
        self.encoder.set_size(image_px, antialias=False)
        self.config = dataclasses.replace(self.config, image_px=image_px)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normals of deviation .02 cut at one deviation, except in the head; branches divided by sqrt(2 l) in block l,
        which in the head is counted from the early layer (masked.md 4.1).
        """
        init_cut_normal(self.encoder, STD, self.config.layer_scale)
        self.norm.reset_parameters()
        nn.init.trunc_normal_(self.mim_head.weight, std=STD, a=-STD, b=STD)
        nn.init.zeros_(self.mim_head.bias)
        for layer, block in enumerate(self.aggregation, self.config.early_layer + 1):
            for module in block.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    module.reset_parameters()
                elif isinstance(module, QueryKeyValue):
                    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # as torch's linear maps
            for name, parameter in block.named_parameters():
                if name.endswith(("q_bias", "v_bias")):
                    nn.init.zeros_(parameter)
                elif "gamma" in name:
                    nn.init.constant_(parameter, self.config.layer_scale)
                elif name.endswith(("out.weight", "fc2.weight")):
                    parameter.div_(math.sqrt(2 * layer))


class PatchAggregation(Objective):
    """Cross-entropy of the visual tokens of hidden patches, predicted after the last block and after the head.

    ``tokenizer``: image -> codes, asked when the batch carries none, or None; a network goes into `Frozen` first.
    Batches carry ``image``, ``image_hide`` and ``image_hidden``, perhaps ``image_code`` and ``drop_path``. Term:
    ``image``, the hidden patches: loss and accuracy after the last block, and ``aggregation``, those after the head;
    both losses count alike. Source: masked.md 4.1.
    """

    def __init__(self, model: BEiT2, tokenizer: ImageTokenizer | None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches."""
        return {"image": len(batch["image_hidden"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Encode the pictures with patches hidden; predict the codes at the hidden patches alone, twice."""
        model, hidden = self.model, batch["image_hidden"]
        codes = self.codes(batch)
        patches = torch.cat(model(batch["image"], batch["image_hide"], batch.get("drop_path"))).flatten(0, 1)
        losses, hits = masked_cross_entropy(
            lambda places: model.code_logits(patches.index_select(0, places)),
            torch.cat([hidden, hidden + codes.numel()]), codes.flatten()[hidden].repeat(2), model.config.codes,
        )  # fmt: skip
        (last, head), (hit, head_hit) = losses.view(2, len(hidden)).sum(1), hits.view(2, len(hidden)).sum(1)
        sums = {"image": last.detach(), "image/accuracy": hit}
        sums |= {"image/aggregation": head.detach(), "image/aggregation_accuracy": head_hit}
        return StepOutput((last + head) / max(1.0, counts["image"]), sums)

    def codes(self, batch: Batch) -> Tensor:
        """Visual tokens of every patch, int64 (B, P): the stored ones, else the tokenizer's."""
        if "image_code" in batch:
            return batch["image_code"]
        if self.tokenizer is None:
            raise ConfigError("masked image modelling needs an image tokenizer, or codes stored with the data")
        return self.tokenizer(batch["image"])


LAYOUTS: Mapping[str, WeightMap] = {
    "official": WeightMap(
        rules=(
            *under("encoder.", "", TIMM_STEM),
            ("encoder.hide_token", "mask_token"),
            ("encoder.bias.table", "rel_pos_bias.relative_position_bias_table"),
            *under("encoder.blocks.{layer}.", "blocks.{layer}.", BEIT_BLOCK),
            *under("aggregation.{layer}.", "cls_pt_layers.{layer}.", BEIT_BLOCK),
            ("norm.{part}", "norm.{part}"),
            ("mim_head.{part}", "lm_head.{part}"),
        ),
        dropped=("rel_pos_bias.relative_position_index",),
    )
}
"""Layout of the published pre-trained files."""
