"""VQ-KD: the image tokenizer of BEiT v2 (Peng et al., 2022, arXiv 2208.06366), vector-quantised knowledge distillation.

An encoder turns patches into unit vectors of few dimensions, each of which is replaced by the nearest of a codebook; a
decoder reads those alone and predicts a teacher's features. The number of a patch's code then is its visual token.

Where we differ: the codebook is the same on all ranks from the first step, which looks up random codes before k-means
places them; dead codes are revived; the teacher is any of our encoders of pictures; pixels are bytes, or lie in [-1, 1]
(the original looks at the largest of a batch). The codebook moves while training alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.backbones.image import ImageModel
from multiway.backbones.vit import build_vit, check_shape, whole_patches
from multiway.errors import ConfigError
from multiway.nn.frozen import Frozen
from multiway.nn.initial import rescale_by_depth
from multiway.nn.linear import Linear
from multiway.nn.pixels import HALF, Colour, Size
from multiway.nn.quantize import Codebook, CodebookUpdate
from multiway.plan import Tokens, dense_tokens
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.layouts import BEIT_BLOCK, TIMM_STEM, under
from multiway.weights.rename import WeightMap

NORM_EPS = 1e-6
STD = 0.02
"""Deviation of first weights."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a VQ-KD: the encoder's as ViT's; ``codes``, ``code_dim``: of the codebook; ``decoder_depth``: blocks of
    the decoder, which is as wide; ``teacher_dim``: width of the features it predicts; ``share``: of the shorter side
    that evaluation looks at.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_px: int | tuple[int, int] = 224
    codes: int = 8192
    code_dim: int = 32
    decoder_depth: int = 3
    teacher_dim: int = 512
    share: float = 224 / 256
    mean: ClassVar[Colour] = HALF
    std: ClassVar[Colour] = HALF
    classes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_shape("VQ-KD", self)


# masked.md 4.2, named as the published files. Micro is ours, for studies on CPUs.
PRESETS: Mapping[str, Config] = {
    "vqkd_encoder_micro_decoder_1x192x3": Config(
        dim=192, depth=6, heads=3, hidden=768, patch=4, image_px=32, codes=512, decoder_depth=1, teacher_dim=192,
        share=1.0,
    ),
    "vqkd_encoder_base_decoder_3x768x12_clip": Config(),
    "vqkd_encoder_base_decoder_1x768x12_clip": Config(decoder_depth=1),
    "vqkd_encoder_base_decoder_1x768x12_dino": Config(decoder_depth=1, teacher_dim=768),
}  # fmt: skip


class VQKD(ImageModel):
    """Encoder, codebook and decoder; called, it is an `ImageTokenizer`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.codes = config.codes
        dim, grid = config.dim, whole_patches(config.image_px, config.patch)
        shape: dict[str, Any] = {"dim": dim, "heads": config.heads, "hidden": config.hidden, "key_bias": False}
        self.encoder = build_vit(
            image_px=config.image_px, patch=config.patch, depth=config.depth, eps=NORM_EPS, **shape
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.down = nn.Sequential(Linear(dim, dim), nn.Tanh(), Linear(dim, config.code_dim))
        self.codebook = Codebook(config.codes, config.code_dim)
        self.decoder = build_vit(
            image_px=grid, patch=1, depth=config.decoder_depth, eps=NORM_EPS, channels=config.code_dim, **shape
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.up = nn.Sequential(Linear(dim, dim), nn.Tanh(), Linear(dim, config.teacher_dim))

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Visual tokens: uint8 (B, 3, H, W) -> int64 (B, P), P row-major; floats are taken to lie in [-1, 1]."""
        return self.codebook(self.features(image))

    def encode(self, *, image: Tensor, draws: Tensor | None = None) -> Tokens:
        """Final tokens of the encoder, before they are narrowed to the codebook's width."""
        return dense_tokens(self.norm(self.encoder(self.pixels(image), draws=draws)))

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean of the patches: (B, D)."""
        return tokens.mean("image", skip=1)

    def features(self, image: Tensor) -> Tensor:
        """What the codebook is asked: unit vectors float32 (B, P, code_dim)."""
        patches = self.patches(self.encode(image=image))
        with torch.autocast(image.device.type, enabled=False):
            return F.normalize(self.down(patches.float()), dim=-1)

    def decode(self, features: Tensor) -> Tensor:
        """The teacher's features, as the decoder predicts them: (B, P, code_dim) -> float32 (B, P, teacher_dim)."""
        drawn = features.transpose(1, 2).unflatten(2, self.decoder.grid)
        patches = self.decoder_norm(self.decoder(drawn)[:, 1:])
        with torch.autocast(features.device.type, enabled=False):
            return self.up(patches.float())

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size from now on; positions are resized bicubically."""
        self.encoder.set_size(image_px, antialias=False)
        self.decoder.set_size(self.encoder.grid, antialias=False)
        self.config = dataclasses.replace(self.config, image_px=image_px)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normals of deviation .02, branches divided by sqrt(2 l) in block l, torch's start of convolutions."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=STD) if parameter.ndim > 1 else nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
        for part in (self.encoder, self.decoder):
            rescale_by_depth(part.blocks)
        self.codebook.init_weights()


class VectorQuantizedDistillation(Objective):
    """One minus the cosine between the decoder's features and the teacher's, and the commitment of features to codes.

    ``teacher``: a model with ``encode(image=...)`` and ``patches(tokens)`` that reads the same pictures; where its grid
    of patches is another one, its map is resized bilinearly to ours. ``commitment``: weight of the squared distance to
    the codes. Batches carry ``image``. Term: ``teacher``, the patches, with ``commitment``, and ``usage`` (share of the
    codes in use) and ``perplexity`` before the step. Raises NumericsError when the codebook stays collapsed.
    Source: masked.md 4.2.
    """

    def __init__(self, model: VQKD, teacher: nn.Module, commitment: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.teacher = Frozen(teacher)
        self.commitment = commitment
        self.update = CodebookUpdate(model.config.codes, model.config.code_dim)

    def init_weights(self) -> None:
        """Initialise the model, and forget which codes were chosen."""
        self.model.init_weights()
        self.update.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Patches."""
        rows, columns = self.model.encoder.grid
        return {"teacher": len(batch["image"]) * rows * columns}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Encode, look up, decode; gradients pass the codebook as if it were not there."""
        model, image, total = self.model, batch["image"], max(1.0, counts["teacher"])
        features = model.features(image)  # (B, P, code_dim)
        codes = model.codebook(features)
        chosen = F.embedding(codes, model.codebook.weight)
        found = model.decode(features + (chosen - features).detach())

        target = self.targets(image)
        apart = (1 - F.cosine_similarity(found, target, dim=-1)).sum()
        commitment = (features - chosen).square().mean(-1).sum()
        usage, perplexity = self.update.usage()
        if self.training:
            self.update.collect(features.detach().flatten(0, 1), codes.flatten(), total, across)
        sums = {"": apart, "/commitment": commitment, "/usage": usage * codes.numel()}
        sums["/perplexity"] = perplexity * codes.numel()
        loss = (apart + self.commitment * commitment) / total
        return StepOutput(loss, {f"teacher{name}": value.detach() for name, value in sums.items()})

    def after_step(self, step: int) -> None:
        """Move the codebook."""
        self.update.apply(self.model.codebook, step)

    @torch.no_grad()
    def targets(self, image: Tensor) -> Tensor:
        """The teacher's features of our patches: uint8 (B, 3, H, W) -> float32 (B, P, teacher_dim).

        Raises ConfigError when they are of another width, or their grid has not the shape of the picture.
        """
        found = self.teacher.patches(self.teacher.encode(image=image)).float()
        grid, (_, patches, width) = self.model.encoder.grid, found.shape
        rows = round(math.sqrt(patches * image.shape[2] / image.shape[3]))
        columns = patches // rows
        if width != self.model.config.teacher_dim or rows * columns != patches:
            raise ConfigError(
                f"the teacher has {patches} patches of {width} numbers for a picture of {tuple(image.shape[2:])} "
                f"pixels, expected a grid and {self.model.config.teacher_dim}: set model.teacher_dim to {width}"
            )
        if (rows, columns) == grid:
            return found
        drawn = found.transpose(1, 2).unflatten(2, (rows, columns))
        return F.interpolate(drawn, size=grid, mode="bilinear").flatten(2).transpose(1, 2)


LAYOUTS: Mapping[str, WeightMap] = {
    "official": WeightMap(
        rules=(
            *under("{side}.", "{side}.", TIMM_STEM),
            *under("{side}.blocks.{layer}.", "{side}.blocks.{layer}.", BEIT_BLOCK),
            ("norm.{part}", "encoder.fc_norm.{part}"),
            ("decoder_norm.{part}", "decoder.fc_norm.{part}"),
            ("down.{layer}.{part}", "encode_task_layer.{layer}.{part}"),
            ("up.{layer}.{part}", "decode_task_layer.{layer}.{part}"),
            ("codebook.weight", "quantize.embedding.weight"),
            ("codebook.cluster_size", "quantize.cluster_size"),
            ("codebook.started", "quantize.embedding.initted"),
        ),
        ones={"{side}.positions": -1},
        dropped=(
            "quantize.embedding.cluster_size", "quantize.embedding.embed_avg",
            "loss{name*}", "teacher{name*}", "scaling{name*}",
        ),
    )
}  # fmt: skip
"""Layout of the published files; what is dropped there was never used, or belongs to the teacher."""
