"""Feature distillation: contrastive learning rivals masked image modeling in fine-tuning via feature distillation (Wei
et al., 2022, arXiv 2205.14141).

A student that starts from random weights predicts the whitened final tokens of a frozen teacher (CLIP, DINO, a
supervised model, any encoder of pictures) from the same view. It has a shared relative bias instead of the teacher's
positions, and it alone drops paths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.backbones.encoder import INIT_STD, EncoderModel, check_encoder
from multiway.backbones.swin import PostNorm
from multiway.errors import ConfigError
from multiway.nn.frozen import Frozen
from multiway.nn.initial import rescale_by_depth
from multiway.nn.linear import Linear
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD, Colour
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.layouts import BEIT_BLOCK, TIMM_STEM, Rules, under
from multiway.weights.rename import WeightMap
from multiway.weights.swin import BUFFERS, OFFICIAL

WHITENING_EPS = 1e-5
BETA = 2.0
"""Error below which the loss is quadratic."""
POST_NORM = 1e-5
"""First weights of the norms behind a Swin V2's branches."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a student.

    ``dim``, ``heads``: of the encoder's first stage, doubled from stage to stage; ``depths``: blocks of each, a ViT has
    one stage; ``window``, ``pretrained_window``: of Swins, as theirs; ``layer_scale``: of a ViT, 0 = none;
    ``drop_path``: rate of the last block; ``teacher_dim``: width of the teacher's tokens, 0 = carry no projection to
    it; ``classes``: of the classifier, 0 = none.
    """

    encoder: Literal["vit", "swin", "swin_v2"] = "vit"
    dim: int = 768
    depths: tuple[int, ...] = (12,)
    heads: int = 12
    patch: int = 16
    window: int = 0
    pretrained_window: tuple[int, ...] = ()
    image_px: int | tuple[int, int] = 224
    drop_path: float = 0.0
    layer_scale: float = 0.1
    teacher_dim: int = 768
    classes: int = 0
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    share: float = 224 / 256

    def __post_init__(self) -> None:
        check_encoder("feature distillation", self)

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def stride(self) -> int:
        """Pixels of a side of what a final token stands for."""
        return self.patch << len(self.depths) - 1


_BASE = Config(drop_path=0.3)

# vision.md 9.2, by teacher: CLIP B/16 and L/14, DINO or DeiT B/16, EsViT Swin-B. Micro is ours, for tests and studies.
PRESETS: Mapping[str, Config] = {
    "fd_vit_micro_patch4_32": Config(dim=192, depths=(6,), heads=3, patch=4, image_px=32, teacher_dim=192, share=1.0),
    "fd_clip_vit_base_patch16_224": dataclasses.replace(_BASE, drop_path=0.2),
    "fd_clip_vit_large_patch14_224": dataclasses.replace(
        _BASE, dim=1024, depths=(24,), heads=16, patch=14, teacher_dim=1024
    ),
    "fd_dino_vit_base_patch16_224": _BASE,
    "fd_deit_vit_base_patch16_224": _BASE,
    "fd_esvit_swinv2_base_window14_224": dataclasses.replace(
        _BASE, encoder="swin_v2", dim=128, depths=(2, 2, 18, 2), heads=4, patch=4, window=14, teacher_dim=1024
    ),
}


class Student(EncoderModel):
    """The encoder with its norm, and the projection to the teacher's width."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.assemble(hide_token=False)
        if config.teacher_dim:
            self.projection = Linear(self.encoder.width, config.teacher_dim)

    def predict(self, image: Tensor, draws: Tensor | None = None) -> Tensor:
        """The teacher's whitened tokens, class token too: (B, N, teacher_dim)."""
        return self.projection(self.encode(image=image, draws=draws).dense("image")[0])

    @torch.no_grad()
    def init_weights(self) -> None:
        """A ViT as BEiT's; a Swin V2 with branches rescaled by depth, too, behind norms of almost zero; the projection
        as torch's.
        """
        super().init_weights()
        if self.config.encoder == "swin_v2":
            rescale_by_depth(self.encoder.blocks)
            nn.init.normal_(self.encoder.embed.weight, std=INIT_STD)
            nn.init.zeros_(self.encoder.embed.bias)
            for branch in (branch for block in self.encoder.blocks for branch in block.children()):
                if isinstance(branch, PostNorm):
                    nn.init.constant_(branch.norm.weight, POST_NORM)
        if self.config.teacher_dim:
            self.projection.reset_parameters()


class FeatureDistillation(Objective):
    """Smooth absolute error between the student's projected tokens and the teacher's whitened ones, class token too.

    ``teacher``: any model with ``encode(image=...)`` for uint8 pictures (an `ImageModel`, a BEiT-3) that has as many
    tokens as the student; it is held by `Frozen`, in evaluation mode, and normalises pictures its own way. Batches
    carry ``image``, perhaps ``drop_path``. Term: ``image``, the pictures. Source: vision.md 9.1.
    """

    def __init__(self, model: Student, teacher: Any) -> None:
        super().__init__()
        if not model.config.teacher_dim:
            raise ConfigError("this student has no projection to its teacher: set model.teacher_dim to its width")
        self.model = model
        self.teacher: Any = Frozen(teacher)

    def init_weights(self) -> None:
        """Initialise the student."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pictures, which all have as many tokens."""
        return {"image": len(batch["image"])}

    def targets(self, image: Tensor) -> Tensor:
        """What is to be predicted: uint8 (B, 3, H, W) -> float32 (B, N, D), every token of mean 0 and variance 1."""
        with torch.no_grad():
            tokens = self.teacher.encode(image=image).dense("image")[0].float()
            return F.layer_norm(tokens, tokens.shape[-1:], eps=WHITENING_EPS)

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Student and teacher see the same view; raises ConfigError when their tokens differ in number or width."""
        target = self.targets(batch["image"])
        found = self.model.predict(batch["image"], batch.get("drop_path")).float()
        if found.shape != target.shape:
            raise ConfigError(
                f"the teacher has {target.shape[1]} tokens of {target.shape[2]} numbers per picture, the student "
                f"{found.shape[1]} of {found.shape[2]}: give them the same grid of patches (model.patch, "
                f"model.image_px), a class token both or neither, and set model.teacher_dim={target.shape[2]}"
            )
        loss = F.smooth_l1_loss(found, target, beta=BETA, reduction="sum") / target[0].numel()
        return StepOutput(loss / counts["image"], {"image": loss.detach()})


_SWIN: Rules = tuple((ours, *(name.replace("cpb_mlp", "rpe_mlp") for name in names)) for ours, *names in OFFICIAL)

LAYOUTS: Mapping[str, WeightMap] = {
    "official": WeightMap(
        rules=(
            *under("encoder.", "encoder.", TIMM_STEM),
            ("encoder.bias.table", "encoder.rel_pos_bias.relative_position_bias_table"),
            *under("encoder.blocks.{layer}.", "encoder.blocks.{layer}.", BEIT_BLOCK),
            ("norm.{part}", "encoder.norm.{part}"),
            *under("encoder.", "encoder.", _SWIN),
            ("projection.{part}", "decoder.0.{part}"),
        ),
        ones={"projection.weight": 1},
        dropped=("feature_model.{name*}", *BUFFERS),
    ),
}
"""Layouts of published files; ``feature_model`` is the teacher, which some of them hold."""
