"""MAE: masked autoencoders are scalable vision learners (He et al., 2021, arXiv 2111.06377).

Three quarters of the patches are not read at all: the encoder, a ViT with fixed positions, sees the rest. A narrow
decoder gets its output, learned tokens in the places of the others, and predicts their pixels.

Where we differ: the patches that are read come in their natural order (the original's is random; blocks do not see
order); the decoder's last linear map runs at hidden patches alone, because only they count.

Re-implemented from the paper's description; the official code and weights are not for commercial use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multiway.backbones.image import ImageModel
from multiway.backbones.vit import build_block, build_vit, check_shape, whole_patches
from multiway.errors import ConfigError
from multiway.nn.linear import Linear
from multiway.nn.patch import patchify
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD, Colour, Size
from multiway.nn.position import sincos_positions
from multiway.plan import Tokens, dense_tokens
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.layouts import TIMM_BLOCK, TIMM_STEM, TRANSFORMERS_BLOCK, TRANSFORMERS_STEM, under
from multiway.weights.rename import WeightMap

NORM_EPS = 1e-6
VARIANCE_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of an MAE: the encoder's as ViT's, then the decoder's, 0 blocks = none (the published encoders).

    ``normed``: whether the pixels of every patch are predicted relative to their own mean and deviation.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    normed: bool = True
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    share: float = 224 / 256
    classes: int = 0

    def __post_init__(self) -> None:
        check_shape("MAE", self)
        if self.dim % 4 or self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ConfigError(
                f"MAE needs widths that are multiples of 4 and decoder_dim divisible by decoder_heads, got dim "
                f"{self.dim}, decoder_dim {self.decoder_dim}, decoder_heads {self.decoder_heads}"
            )


# vision.md 4.1: 111.9, 329.5 and 657.1 million parameters with the decoder. Micro is ours, for studies on CPUs.
PRESETS: Mapping[str, Config] = {
    "mae_vit_micro_patch4_32": Config(
        dim=192, depth=6, heads=3, hidden=768, patch=4, image_px=32, share=1.0,
        decoder_dim=96, decoder_depth=2, decoder_heads=3,
    ),
    "mae_vit_base_patch16_224": Config(),
    "mae_vit_large_patch16_224": Config(dim=1024, depth=24, heads=16, hidden=4096),
    "mae_vit_huge_patch14_224": Config(dim=1280, depth=32, heads=16, hidden=5120, patch=14),
}  # fmt: skip
PRESETS |= {f"{name}_encoder": dataclasses.replace(shape, decoder_depth=0) for name, shape in PRESETS.items()}


class Decoder(nn.Module):
    """What the encoder saw, and where -> pixels of the patches it did not see."""

    positions: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, grid = config.decoder_dim, whole_patches(config.image_px, config.patch)
        self.embed = Linear(config.dim, dim)
        self.hide_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, grid, prefix=1))
        self.blocks = nn.ModuleList(
            build_block(dim=dim, heads=config.decoder_heads, hidden=4 * dim, eps=NORM_EPS)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pixels = Linear(dim, 3 * config.patch**2)

    def forward(self, x: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """x: (B, 1 + K, D) of class token and the patches ``keep``, int64 (B, K); hidden: flat indices int64 (M,) into
        (B, P) -> (M, 3 patch^2).
        """
        x = self.embed(x)
        patches = self.positions.shape[0] - 1
        filled = self.hide_token.to(x.dtype).expand(len(x), patches, -1)
        filled = filled.scatter(1, keep[..., None].expand(-1, -1, x.shape[2]), x[:, 1:])
        x = torch.cat([x[:, :1], filled], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x[:, 1:].flatten(0, 1).index_select(0, hidden)))


class MAE(ImageModel):
    """The encoder with its norm, and the decoder that pre-training needs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_vit(
            image_px=config.image_px, patch=config.patch, dim=config.dim, depth=config.depth, heads=config.heads,
            hidden=config.hidden, eps=NORM_EPS, positions="sincos",
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        if config.decoder_depth:
            self.decoder = Decoder(config)
        if config.classes:
            self.head = Linear(config.dim, config.classes)

    def encode(self, *, image: Tensor, draws: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Tokens after the final norm; keep: int64 (B, K), the patches that are read at all, None = all."""
        return dense_tokens(self.norm(self.encoder(self.pixels(image), keep=keep, draws=draws)))

    def pool(self, tokens: Tokens) -> Tensor:
        """The class token, as for MAE's linear probe: (B, D)."""
        return tokens.prefix("image")

    def predict(self, image: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """Pixels of hidden patches: image (B, 3, H, W), keep int64 (B, K), hidden flat int64 (M,) -> (M, 3 patch^2),
        each patch pixel by pixel (y, x, channel), in the units of `targets`.
        """
        return self.decoder(self.encode(image=image, keep=keep).dense("image")[0], keep, hidden)

    def targets(self, image: Tensor, hidden: Tensor) -> Tensor:
        """What is to be predicted there: normalised pixels, float32 (M, 3 patch^2), relative to each patch's mean and
        (unbiased) deviation when the config says so.
        """
        pixels = patchify(self.pixels(image), self.config.patch).flatten(0, 1).index_select(0, hidden)
        pixels = pixels.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)
        if self.config.normed:
            variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            pixels = (pixels - mean) * (variance + VARIANCE_EPS).rsqrt()
        return pixels

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size from now on; fixed positions are computed anew, which is exact."""
        self.encoder.grid = whole_patches(image_px, self.config.patch)
        self.config = dataclasses.replace(self.config, image_px=image_px)
        for part in self.placed():
            part.positions = self.fixed(part).to(part.positions)

    def no_decay(self, name: str) -> bool:
        """No matrix: positions are fixed, and the original has its tokens decay."""
        return False

    def placed(self) -> list[Any]:
        """The parts that have positions: the encoder, and the decoder if there is one."""
        return [self.encoder, self.decoder] if self.config.decoder_depth else [self.encoder]

    def fixed(self, part: Any) -> Tensor:
        """The positions a part must have."""
        return sincos_positions(part.positions.shape[1], self.encoder.grid, prefix=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform linear maps (patches as one), biases 0, norms 1 and 0, tokens of deviation .02."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        if self.config.decoder_depth:
            nn.init.normal_(self.decoder.hide_token, std=0.02)
        for part in self.placed():
            part.positions.copy_(self.fixed(part))


class MaskedAutoencoding(Objective):
    """Mean squared error of the pixels of hidden patches.

    Batches carry ``image``, ``image_keep`` and ``image_hidden``. Term: ``image``, the hidden patches.
    Source: vision.md 4.2.
    """

    def __init__(self, model: MAE) -> None:
        super().__init__()
        if not model.config.decoder_depth:
            raise ConfigError("masked autoencoding needs a decoder: set model.decoder_depth, 8 in the paper")
        self.model = model

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches."""
        return {"image": len(batch["image_hidden"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Encode what is kept, predict what is hidden."""
        image, hidden = batch["image"], batch["image_hidden"]
        found = self.model.predict(image, batch["image_keep"], hidden)
        error = (found.float() - self.model.targets(image, hidden)).square().mean(-1).sum()
        return StepOutput(error / counts["image"], {"image": error.detach()})


_BLOCK = "encoder.blocks.{layer}."
_DECODER = (("decoder.hide_token", "mask_token"), ("decoder.positions", "decoder_pos_embed"))
_ONES = {"encoder.positions": -1, "decoder.positions": -1}

LAYOUTS: Mapping[str, WeightMap] = {
    "official": WeightMap(
        rules=(
            *under("encoder.", "", TIMM_STEM),
            *under(_BLOCK, "blocks.{layer}.", TIMM_BLOCK),
            ("norm.{part}", "norm.{part}"),
            ("head.{part}", "head.{part}"),
            *_DECODER,
            ("decoder.embed.{part}", "decoder_embed.{part}"),
            *under("decoder.blocks.{layer}.", "decoder_blocks.{layer}.", TIMM_BLOCK),
            ("decoder.norm.{part}", "decoder_norm.{part}"),
            ("decoder.pixels.{part}", "decoder_pred.{part}"),
        ),
        ones=_ONES,
    ),
    "transformers": WeightMap(
        rules=(
            *under("encoder.", "vit.", TRANSFORMERS_STEM),
            *under(_BLOCK, "vit.encoder.layer.{layer}.", TRANSFORMERS_BLOCK),
            ("norm.{part}", "vit.layernorm.{part}"),
            *under("", "decoder.", _DECODER),
            ("decoder.embed.{part}", "decoder.decoder_embed.{part}"),
            *under("decoder.blocks.{layer}.", "decoder.decoder_layers.{layer}.", TRANSFORMERS_BLOCK),
            ("decoder.norm.{part}", "decoder.decoder_norm.{part}"),
            ("decoder.pixels.{part}", "decoder.decoder_pred.{part}"),
        ),
        ones=_ONES,
        prefix="vit.",
    ),
}
"""Layouts of published files."""
