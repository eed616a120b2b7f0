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

    ``config``: the kind ``encoder`` with its ``dim`` and ``heads``, of the first stage, and ``depths``, blocks of every
    stage (a ViT has one); ``patch``, ``image_px``, ``drop_path``, ``layer_scale``, ``window``, ``trained_window`` as
    the kinds know them; ``classes``. ``hide_token``: whether patches can be hidden.
    """

    def __init__(self, config: Any, hide_token: bool) -> None:
        super().__init__()
        self.config = config
        self.prefix = int(config.encoder == "vit")  # type: ignore[misc]
        self.encoder = build_encoder(config, hide_token)
        width = self.encoder.width
        self.norm = nn.LayerNorm(width, eps=VIT_EPS) if config.encoder == "vit" else nn.Identity()
        if config.classes:
            self.head = Linear(width, config.classes)

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
            changes["trained_window"] = self.config.trained_window or sides
        self.config = dataclasses.replace(self.config, **changes)
        if self.config.encoder == "vit":
            encoder.set_size(image_px, antialias=False)
        elif self.config.encoder != "resnet":
            for stage, grid in zip(encoder.stages, encoder.grids(image_px), strict=True):
                for module in stage.modules():
                    if isinstance(module, RelativeBias):
                        module.resize((min(window, *grid),) * 2, "geometric")
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


def build_encoder(config: Any, hide_token: bool) -> nn.Module:
    """Assemble the encoder of an `EncoderModel`."""
    if config.encoder == "resnet":
        return ResNet(config.dim, config.depths, hide_token)
    shape: dict[str, Any] = {
        "image_px": config.image_px, "patch": config.patch, "dim": config.dim, "heads": config.heads,
        "drop_path": config.drop_path, "hide_token": hide_token,
    }  # fmt: skip
    if config.encoder == "swin":
        return build_swin(**shape, depths=config.depths, window=config.window)
    if config.encoder == "swin_v2":
        own = {"window": config.window, "trained_window": config.trained_window}
        return build_swin_v2(**shape, depths=config.depths, **own)
    return build_vit(
        **shape, depth=config.depths[0], hidden=FFN_RATIO * config.dim, eps=VIT_EPS, positions="none", bias="shared",
        key_bias=False, layer_scale=config.layer_scale,
    )  # fmt: skip


def check_encoder(system: str, config: Any) -> None:
    """Raise ConfigError unless a config describes an encoder of its kind, and pictures are whole final patches."""
    kind, swin = config.encoder, config.encoder.startswith("swin")
    wrong = {
        f"depths of one stage, got {config.depths}": kind == "vit" and len(config.depths) != 1,
        f"dim divisible by heads, got {config.dim} and {config.heads}": kind != "resnet" and config.dim % config.heads,
        f"a window, got {config.window}": swin and config.window < 1,
        f"a trained_window per stage or none, got {config.trained_window}": swin
        and len(config.trained_window) not in (0, len(config.depths)),
        f"patches of {STEM_STRIDE} pixels, got {config.patch}": kind == "resnet" and config.patch != STEM_STRIDE,
        f"drop_path 0, no block of it is dropped, got {config.drop_path}": kind == "resnet" and config.drop_path,
    }
    if any(wrong.values()):
        raise ConfigError(f"{system} with encoder {kind!r} needs {'; '.join(told for told, so in wrong.items() if so)}")
    whole_patches(config.image_px, config.stride)
