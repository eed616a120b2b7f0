"""SimMIM: a simple framework for masked image modeling (Xie et al., 2021, arXiv 2111.09886).

Patches are hidden block by block: an encoder of any kind reads a learned token in their place, and one linear map
predicts their pixels from its output. The encoder is a ViT as BEiT's (no table of positions, one relative bias for all
blocks, keys without bias, LayerScale), a Swin, a Swin V2, or a ResNet, whose code was never published.

Where we differ: the ViT's linear map runs at hidden patches alone, because only they count; the ResNet does not read
pixels of hidden patches at all, which its overlapping windows would see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.backbones.encoder import EncoderModel, Kind, check_encoder
from multiway.backbones.vit import whole_patches
from multiway.errors import ConfigError
from multiway.nn.linear import Linear
from multiway.nn.patch import patchify, unpatchify
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD, Colour
from multiway.types import Across, Batch, Objective, StepOutput
from multiway.weights.layouts import BEIT_BLOCK, TIMM_STEM, under
from multiway.weights.rename import WeightMap
from multiway.weights.swin import BUFFERS, OFFICIAL, TRANSFORMERS

VARIANCE_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a SimMIM.

    ``dim``, ``heads``: of the encoder's first stage, doubled from stage to stage; ``depths``: blocks of each, a ViT has
    one stage; ``patch``: pixels of what is hidden or not; ``window``, ``pretrained_window``: of Swins, as theirs;
    ``layer_scale``: of a ViT, 0 = none; ``drop_path``: rate of the last block; ``target_window``: side in pixels of the
    window around each pixel by whose mean and deviation it is normalised to be predicted, 0 = it is not;
    ``masked``: carry the token and the linear map that pre-training needs; ``classes``: of the classifier, 0 = none.
    """

    encoder: Kind = "vit"
    dim: int = 768
    depths: tuple[int, ...] = (12,)
    heads: int = 12
    patch: int = 16
    window: int = 0
    pretrained_window: tuple[int, ...] = ()
    image_px: int | tuple[int, int] = 224
    drop_path: float = 0.0
    layer_scale: float = 0.1
    target_window: int = 0
    masked: bool = True
    classes: int = 0
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    share: float = 224 / 256

    def __post_init__(self) -> None:
        check_encoder("SimMIM", self)
        if self.target_window and (self.target_window % 2 == 0 or self.target_window < 3):
            raise ConfigError(
                f"target_window, centred on a pixel, is odd and at least 3, or 0; got {self.target_window}"
            )

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, which are hidden or not."""
        return whole_patches(self.image_px, self.patch)

    @property
    def stride(self) -> int:
        """Pixels of a side of what a final token stands for."""
        return self.patch << len(self.depths) - 1


_SWIN = Config(encoder="swin", dim=128, depths=(2, 2, 18, 2), heads=4, patch=4, window=6, image_px=192)
_SWIN_V2 = dataclasses.replace(_SWIN, encoder="swin_v2", window=12, drop_path=0.1, target_window=47)
_RESNET50 = Config(encoder="resnet", dim=64, depths=(3, 4, 6, 3), patch=4, image_px=192)

# vision.md 7.3; the Swin V2s are those of the scaling study (7.7), ResNet-50x4 is four times as wide. Micro is ours,
# for tests and studies on CPUs.
PRESETS: Mapping[str, Config] = {
    "simmim_vit_micro_patch4_32": Config(dim=192, depths=(6,), heads=3, patch=4, image_px=32, share=1.0),
    "simmim_vit_base_patch16_224": Config(drop_path=0.1),
    "simmim_swin_base_window6_192": _SWIN,
    "simmim_swin_large_window12_192": dataclasses.replace(_SWIN, dim=192, heads=6, window=12),
    **{
        f"simmim_swinv2_{name}_window12_192": dataclasses.replace(_SWIN_V2, dim=dim, heads=dim // 32)
        for name, dim in {"small": 96, "base": 128, "large": 192, "huge": 352, "giant": 448}.items()
    },
    "simmim_resnet50_192": _RESNET50,
    "simmim_resnet50x4_192": dataclasses.replace(_RESNET50, dim=256),
}


class SimMIM(EncoderModel):
    """The encoder with its norm, and the linear map that pre-training needs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.assemble(hide_token=config.masked)
        if config.masked:
            self.decoder = Linear(self.encoder.width, 3 * config.stride**2)

    def predict(self, image: Tensor, hide: Tensor, hidden: Tensor, draws: Tensor | None = None) -> Tensor:
        """Pixels of hidden patches, in the units of `targets`: image (B, 3, H, W), hide bool (B, P), hidden int64 (M,),
        its True places as flat indices -> (M, 3 patch^2), each patch as (channel, y, x).
        """
        if self.config.stride > self.config.patch:
            return self._patches(self.reconstruct(image, hide, draws), hidden)
        tokens = self.patches(self.encode(image=image, draws=draws, hide=hide))
        return self.decoder(tokens.flatten(0, 1).index_select(0, hidden))

    def reconstruct(self, image: Tensor, hide: Tensor, draws: Tensor | None = None) -> Tensor:
        """All pixels as they are predicted, in the units of `targets`: (B, 3, H, W)."""
        cells = self.decoder(self.patches(self.encode(image=image, draws=draws, hide=hide)))
        return unpatchify(cells, self.config.stride, whole_patches(self.config.image_px, self.config.stride))

    def targets(self, image: Tensor, hidden: Tensor) -> Tensor:
        """What `predict` is to find: normalised pixels, float32 (M, 3 patch^2), relative to their surroundings when the
        config says so.
        """
        pixels = self.pixels(image)
        if self.config.target_window:
            pixels = relative_to_window(pixels, self.config.target_window)
        return self._patches(pixels, hidden)

    def _patches(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        return patchify(pixels, self.config.patch).flatten(0, 1).index_select(0, hidden)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The encoder as its kind starts, the linear map as torch's."""
        super().init_weights()
        if self.config.masked:
            self.decoder.reset_parameters()


def relative_to_window(pixels: Tensor, window: int) -> Tensor:
    """Every pixel relative to mean and (unbiased) deviation of the ``window`` x ``window`` pixels around it, of its own
    channel, cut at the border: float (B, C, H, W) -> the same shape.
    """
    half = window // 2

    def mean(x: Tensor) -> Tensor:  # of columns, then of rows: window + window steps instead of window * window
        x = F.avg_pool2d(x, (window, 1), 1, (half, 0), count_include_pad=False)
        return F.avg_pool2d(x, (1, window), 1, (0, half), count_include_pad=False)

    def inside(length: int) -> Tensor:
        place = torch.arange(length, device=pixels.device)
        return (place + half).clamp(max=length - 1) - (place - half).clamp(min=0) + 1

    count = inside(pixels.shape[2])[:, None] * inside(pixels.shape[3])
    centre = mean(pixels)
    variance = (mean(pixels.square()) - centre.square()) * (count / (count - 1))
    return (pixels - centre) * (variance.clamp(min=0) + VARIANCE_EPS).rsqrt()


class MaskedImageModeling(Objective):
    """Mean absolute error of the pixels of hidden patches.

    Batches carry ``image``, ``image_hide`` and ``image_hidden``. Term: ``image``, the hidden pixels. Batch norms look
    at all pictures of a batch, so that of a ResNet cannot be split. Source: vision.md 7.1.
    """

    def __init__(self, model: SimMIM) -> None:
        super().__init__()
        if not model.config.masked:
            raise ConfigError("this SimMIM has nothing that predicts pixels: set model.masked to true")
        self.model = model
        self.splittable = model.config.encoder != "resnet"

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden pixels."""
        return {"image": len(batch["image_hidden"]) * self.model.config.patch**2}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Read pictures with tokens in the place of hidden patches, predict those patches."""
        image, hidden = batch["image"], batch["image_hidden"]
        found = self.model.predict(image, batch["image_hide"], hidden, batch.get("drop_path"))
        error = (found.float() - self.model.targets(image, hidden)).abs().sum() / 3
        return StepOutput(error / max(1.0, counts["image"]), {"image": error.detach()})


_PLACES = [f"{stage}.{i}" for stage, depth in enumerate((3, 4, 6, 3), start=1) for i in range(depth)]

LAYOUTS: Mapping[str, WeightMap] = {
    "official": WeightMap(
        rules=(
            *under("encoder.", "encoder.", TIMM_STEM),
            ("encoder.hide_token", "encoder.mask_token"),
            ("encoder.bias.table", "encoder.rel_pos_bias.relative_position_bias_table"),
            *under("encoder.blocks.{layer}.", "encoder.blocks.{layer}.", BEIT_BLOCK),
            ("norm.{part}", "encoder.norm.{part}"),
            *under("encoder.", "encoder.", OFFICIAL),
            ("decoder.{part}", "decoder.0.{part}"),
        ),
        ones={"decoder.weight": 2},
        dropped=BUFFERS,
    ),
    "transformers": WeightMap(  # a Swin
        rules=(*under("encoder.", "swin.", TRANSFORMERS), ("decoder.{part}", "decoder.0.{part}")),
        ones={"decoder.weight": 2},
        dropped=BUFFERS,
    ),
    "torchvision": WeightMap(  # also timm's: a supervised ResNet-50, without what masked pre-training needs
        rules=(
            ("encoder.embed.0.{part}", "conv1.{part}"),
            ("encoder.embed.1.{part}", "bn1.{part}"),
            ("encoder.blocks.{layer}.conv{n}.0.{part}", "layer{layer}.conv{n}.{part}"),
            ("encoder.blocks.{layer}.conv{n}.1.{part}", "layer{layer}.bn{n}.{part}"),
            ("encoder.blocks.{layer}.shortcut.{i}.{part}", "layer{layer}.downsample.{i}.{part}"),
            ("head.{part}", "fc.{part}"),
        ),
        words={"layer": {str(layer): place for layer, place in enumerate(_PLACES)}},
    ),
}
"""Layouts of published files."""
