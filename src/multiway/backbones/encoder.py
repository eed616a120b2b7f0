"""Models of pictures whose encoder is chosen by kind: what systems that take any encoder share."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multiway.backbones.image import ImageModel
from multiway.backbones.resnet import STEM_STRIDE, ResNet
from multiway.backbones.swin import build_swin, build_swin_v2
from multiway.backbones.vit import build_vit, whole_patches
from multiway.errors import ConfigError
from multiway.nn.initial import init_cut_normal
from multiway.nn.linear import Linear
from multiway.nn.pixels import Size
from multiway.nn.relative import RelativeBias
from multiway.plan import Tokens, dense_tokens

Kind = Literal["vit", "swin", "swin_v2", "resnet"]

VIT_EPS = 1e-6
INIT_STD = 0.02
FFN_RATIO = 4


class EncoderModel(ImageModel):
    """A model around a ViT (as BEiT's: no table of positions, one relative bias for all blocks, keys without bias,
    LayerScale), a Swin, a Swin V2 or a ResNet, with its final norm and perhaps a classifier of the mean of its patches.

    ``config`` names the kind, ``encoder``, with ``dim`` and ``heads`` of its first stage, and ``depths``, the blocks of
    every stage (a ViT has one); ``patch``, ``image_px``, ``drop_path``, ``layer_scale``, ``window`` and
    ``pretrained_window`` as the kinds know them; ``stride``, pixels of a side of a final patch; ``classes``.
    """

    def assemble(self, hide_token: bool) -> None:
        """Build encoder, norm and classifier as the config says; ``hide_token``: whether patches can be hidden."""
        config = self.config
        self.prefix = int(config.encoder == "vit")
        named = {"image_px": config.image_px, "patch": config.patch, "dim": config.dim, "heads": config.heads}
        named |= {"drop_path": config.drop_path, "hide_token": hide_token}
        self.norm: nn.Module = nn.Identity()
        if config.encoder == "resnet":
            self.encoder = ResNet(config.dim, config.depths, hide_token)
        elif config.encoder == "swin":
            self.encoder = build_swin(**named, depths=config.depths, window=config.window)
        elif config.encoder == "swin_v2":
            own = {"window": config.window, "pretrained_window": config.pretrained_window}
            self.encoder = build_swin_v2(**named, depths=config.depths, **own)
        else:
            own = {"positions": "none", "bias": "shared", "key_bias": False, "layer_scale": config.layer_scale}
            hidden = FFN_RATIO * config.dim
            self.encoder = build_vit(**named, depth=config.depths[0], hidden=hidden, eps=VIT_EPS, **own)
            self.norm = nn.LayerNorm(config.dim, eps=VIT_EPS)
        if config.classes:
            self.head = Linear(self.encoder.width, config.classes)

    def encode(self, *, image: Tensor, draws: Tensor | None = None, hide: Tensor | None = None) -> Tokens:
        """Tokens after the final norm (a ResNet has none); hide: bool (B, P), True = the learned token is read there,
        None = nothing is hidden.
        """
        return dense_tokens(self.norm(self.encoder(self.pixels(image), hide=hide, draws=draws)))

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean of the patches: (B, D)."""
        return tokens.mean("image", skip=self.prefix)

    def set_image_size(self, image_px: Size, window: int | None = None) -> None:
        """Read pictures of another size from now on; tables of biases are resized geometrically. ``window``: of Swins,
        None = as it is where maps are large enough.
        """
        encoder, window = self.encoder, window or self.config.window
        changes: dict[str, Any] = {"image_px": image_px, "window": window}
        if self.config.encoder == "swin_v2":
            sides = tuple(stage.window for stage in encoder.stages)
            changes["pretrained_window"] = self.config.pretrained_window or sides
        self.config = dataclasses.replace(self.config, **changes)
        if self.config.encoder == "vit":
            encoder.set_size(image_px, antialias=False)
        elif self.config.encoder != "resnet":
            for stage, grid in zip(encoder.stages, encoder.grids(image_px), strict=True):
                resize_tables(stage, min(window, *grid))
            encoder.set_size(image_px, window)

    def layer_of(self, name: str) -> int:
        """As every model's; of a Swin a stage's last for what merges its map."""
        if not name.startswith("encoder.stages."):
            return super().layer_of(name)
        stage, part, block = name.split(".")[2:5]
        before, own = sum(self.config.depths[: int(stage)]), self.config.depths[int(stage)]
        return before + (int(block) + 1 if part == "blocks" else own)

    def no_decay(self, name: str) -> bool:
        """Matrices without weight decay: tokens; of Swins tables and MLPs of biases, and scales of cosines."""
        return name.endswith(("_token", "logit_scale")) or (name.startswith("encoder.stages.") and ".bias." in name)

    @torch.no_grad()
    def init_weights(self) -> None:
        """BEiT's start of a ViT, every other kind's own; a classifier of deviation .02."""
        if self.config.encoder == "vit":
            init_cut_normal(self.encoder, INIT_STD, self.config.layer_scale)
            self.norm.reset_parameters()  # type: ignore[operator]
        else:
            self.encoder.init_weights()
        if self.config.classes:
            nn.init.normal_(self.head.weight, std=INIT_STD)
            nn.init.zeros_(self.head.bias)


def resize_tables(stage: nn.Module, side: int) -> None:
    """Have a Swin's tables of biases serve windows of this side, as SimMIM's fine-tuning does it."""
    for module in stage.modules():
        if isinstance(module, RelativeBias):
            module.resize((side, side), "geometric")


def check_encoder(system: str, shape: Any) -> None:
    """Raise ConfigError unless ``shape``, of what `EncoderModel` names, is one of its kind and cuts pictures evenly."""
    kind, swin = shape.encoder, shape.encoder.startswith("swin")
    wrong = {
        f"depths of one stage, got {shape.depths}": kind == "vit" and len(shape.depths) != 1,
        f"dim divisible by heads, got {shape.dim} and {shape.heads}": kind != "resnet" and shape.dim % shape.heads,
        f"a window, got {shape.window}": swin and shape.window < 1,
        f"a pretrained_window per stage or none, got {shape.pretrained_window}": swin
        and len(shape.pretrained_window) not in (0, len(shape.depths)),
        f"patches of {STEM_STRIDE} pixels, got {shape.patch}": kind == "resnet" and shape.patch != STEM_STRIDE,
        f"drop_path 0, no block of it is dropped, got {shape.drop_path}": kind == "resnet" and shape.drop_path,
    }
    if any(wrong.values()):
        raise ConfigError(f"{system} with encoder {kind!r} needs {'; '.join(told for told, so in wrong.items() if so)}")
    whole_patches(shape.image_px, shape.stride)
