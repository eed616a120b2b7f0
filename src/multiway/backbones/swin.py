"""The Swin Transformer: a pyramid of stages whose attention sees windows, shifted in every second block; V1 and V2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.backbones.image import ImageModel
from multiway.errors import ConfigError
from multiway.nn.block import Residual
from multiway.nn.ffn import FeedForward, NormLinear
from multiway.nn.linear import Linear, QueryKeyValue
from multiway.nn.patch import PatchEmbed
from multiway.nn.pixels import Size, sides
from multiway.nn.relative import RelativeBias
from multiway.nn.window import ContinuousBias, CosineScores, Layout, WindowAttention, make_layout
from multiway.plan import Tokens

RATIO = 4
"""Width inside the FFNs, over that of their stage."""
INIT_STD = 0.02
LAYOUTS_KEPT = 64
"""Layouts of maps that are remembered, eight for every size of picture."""


class PostNorm(nn.Module):
    """A branch, then its norm (res-post-norm of Swin V2); with a norm of zeros the branch adds nothing."""

    def __init__(self, branch: nn.Module, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.branch = branch
        self.norm = norm

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """x and what else the branch takes -> the branch's shape."""
        return self.norm(self.branch(x, *context))


class Merge(nn.Module):
    """Four neighbours become one: (B, rows, columns, D) -> half as many of each, 2 D wide, odd maps padded with zeros.

    ``project``: 4 D -> 2 D, of upper left, lower left, upper right, lower right; norms belong to it.
    """

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project

    def forward(self, x: Tensor) -> Tensor:
        """Gather the neighbours, project them."""
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.project(x.permute(0, 1, 3, 4, 2, 5).flatten(3))


class Stage(nn.Module):
    """Blocks on one map, and what merges it for the next stage; None = the last. ``window``: side of its windows."""

    def __init__(self, blocks: Sequence[nn.Module], merge: Merge | None, heads: int, window: int) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(blocks)
        self.merge = merge
        self.heads, self.window = heads, window


class SwinTransformer(nn.Module):
    """Normalised pictures of any size -> places of the last stage's map (B, P, D), row-major, after the final norm.

    ``width``: D; ``hide_token``: whether hidden patches are replaced by a learned token. Pictures and maps are padded
    with zeros to whole patches and windows; a map no larger than its window is not shifted. Source: vision.md 5.
    """

    TOKENS: ClassVar[tuple[str, ...]] = ("encoder.embed_norm.", "encoder.hide_token")
    """Parameters of layer 0, besides those of ``embed``."""

    def __init__(self, embed: PatchEmbed, stages: Sequence[Stage], width: int, hide_token: bool) -> None:
        super().__init__()
        self.embed = embed
        self.embed_norm = nn.LayerNorm(embed.out_channels)
        self.hide_token = nn.Parameter(torch.zeros(1, 1, embed.out_channels)) if hide_token else None
        self.stages: Any = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(width)
        self.width = width
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def forward(self, image: Tensor, hide: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """image: float (B, 3, H, W); hide: bool (B, P) of the first stage, True = replaced by ``hide_token``; draws:
        (2 L, B) for stochastic depth, None = nothing dropped -> (B, P, D) of the last.
        """
        return self.norm(self.maps(image, hide, draws)[-1]).flatten(1, 2)

    def maps(self, image: Tensor, hide: Tensor | None = None, draws: Tensor | None = None) -> list[Tensor]:
        """The map of every stage, before it is merged: (B, rows, columns, D) each."""
        x = self.tokens(image, hide)
        maps, done = [], 0
        for stage in self.stages:
            plain, shifted = self.layouts(stage, x)
            for i, block in enumerate(stage.blocks, done):
                own = None if draws is None else draws[2 * i : 2 * i + 2]
                x = block(x, own, shifted if (i - done) % 2 else plain)
            done += len(stage.blocks)
            maps.append(x)
            if stage.merge is not None:
                x = stage.merge(x).to(x.dtype)
        return maps

    def tokens(self, image: Tensor, hide: Tensor | None = None) -> Tensor:
        """What the first block reads: (B, rows, columns, D), in the parameters' dtype, as all that branches add to."""
        patch = self.embed.kernel_size[0]
        height, width = image.shape[2:]
        image = F.pad(image.to(self.embed.weight.dtype), (0, -width % patch, 0, -height % patch))
        x = self.embed_norm(self.embed(image)).to(self.embed_norm.weight.dtype)  # (B, P, D)
        if hide is not None:
            assert self.hide_token is not None, "built with hide_token"
            x = torch.where(hide[..., None], self.hide_token, x)
        return x.unflatten(1, self.grids((height, width))[0])

    def layouts(self, stage: Stage, x: Tensor) -> tuple[Layout, Layout]:
        """How a stage's map lies in its windows, and in its shifted windows."""
        size = x.shape[1], x.shape[2]
        shift = stage.window // 2 if min(size) > stage.window else 0
        result = []
        for own in (0, shift):
            key = size, stage.window, own, stage.heads, x.device
            if key not in self._layouts:
                if len(self._layouts) >= LAYOUTS_KEPT:
                    self._layouts.clear()
                self._layouts[key] = make_layout(*key)
            result.append(self._layouts[key])
        return result[0], result[1]

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of all stages."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def stride(self) -> int:
        """Pixels of a side of the last map's places."""
        return self.embed.kernel_size[0] * 2 ** (len(self.stages) - 1)

    def grids(self, size: Size) -> list[tuple[int, int]]:
        """Rows and columns of every stage's map of such a picture."""
        return grids(size, self.embed.kernel_size[0], len(self.stages))

    def set_size(self, size: Size, window: int, method: Literal["geometric", "bicubic"] = "bicubic") -> None:
        """Prepare for pictures of this size: every stage's windows have side ``window``, or that of its map if that is
        smaller; tables of biases are resized by the ``method`` (see `resize_bias_table`), MLPs serve as they are.
        """
        for stage, grid in zip(self.stages, self.grids(size), strict=True):
            side = min(window, *grid)
            stage.window = side
            for module in stage.modules():
                if isinstance(module, RelativeBias):
                    module.resize((side, side), method)
                elif isinstance(module, ContinuousBias):
                    module.resize(side)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of deviation .02, biases 0, norms 1 and 0, those of res-post-norm 0, so that V2's blocks are
        the identity; the patches' convolution as PyTorch has it.
        """
        for module in self.modules():
            if isinstance(module, PatchEmbed | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | QueryKeyValue):
                nn.init.normal_(module.weight, std=INIT_STD)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.table, std=INIT_STD)
            elif isinstance(module, CosineScores):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith("bias") and not name.startswith("embed."):
                nn.init.zeros_(parameter)
        for block in self.blocks:
            for branch in block.children():
                if isinstance(branch, PostNorm):
                    nn.init.zeros_(branch.norm.weight)
        if self.hide_token is not None:
            nn.init.normal_(self.hide_token, std=INIT_STD)


class SwinModel(ImageModel):
    """What `Swin` and `SwinV2` share as models of pictures: no class token, the class is read from the mean."""

    prefix: int = 0

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean of all places: (B, D)."""
        return tokens.mean("image")

    def features(self, image: Tensor) -> list[Tensor]:
        """The map of every stage, (B, D, rows, columns) at strides 4 to 32, without a norm, for dense tasks."""
        return [x.permute(0, 3, 1, 2) for x in self.encoder.maps(self.pixels(image))]

    def layer_of(self, name: str) -> int:
        """0 for patches and token, i + 1 for block i, a stage's last for its merging, depth + 1 for the rest."""
        if not name.startswith("encoder.stages."):
            return super().layer_of(name)
        stage, part, *rest = name.split(".")[2:]
        before = sum(len(own.blocks) for own in self.encoder.stages[: int(stage)])
        return before + (int(rest[0]) + 1 if part == "blocks" else len(self.encoder.stages[int(stage)].blocks))

    def no_decay(self, name: str) -> bool:
        """Matrices without weight decay: tables and MLPs of biases, scales of cosines."""
        return ".bias." in name or name.endswith("logit_scale")


def build_swin(
    *,
    image_px: Size,
    patch: int,
    dim: int,
    depths: Sequence[int],
    heads: int,
    window: int,
    drop_path: float = 0.0,
    hide_token: bool = False,
) -> SwinTransformer:
    """Assemble Swin's: norms before the branches, scaled dot products, tables of biases.

    ``dim``, ``heads``: of the first stage, doubled from stage to stage; ``depths``: blocks per stage; ``window``: side,
    smaller where a map is; ``drop_path``: rate of the last block, rising linearly from 0 at the first.
    """

    def block(stage: int, dim: int, heads: int, window: int, rate: float) -> Residual:
        bias = RelativeBias((window, window), heads)
        attention = WindowAttention(nn.LayerNorm(dim), Linear(dim, 3 * dim), Linear(dim, dim), bias)
        norm, hidden = nn.LayerNorm(dim), RATIO * dim
        return Residual(attention, FeedForward(norm, Linear(dim, hidden), nn.Identity(), Linear(hidden, dim)), rate)

    def merge(dim: int) -> Merge:
        return Merge(NormLinear(nn.LayerNorm(4 * dim), Linear(4 * dim, 2 * dim, bias=False)))

    return _build(image_px, PatchEmbed(patch, dim), depths, heads, window, drop_path, hide_token, block, merge)


def build_swin_v2(
    *,
    image_px: Size,
    patch: int,
    dim: int,
    depths: Sequence[int],
    heads: int,
    window: int,
    pretrained_window: Sequence[int] = (),
    drop_path: float = 0.0,
    hide_token: bool = False,
) -> SwinTransformer:
    """Assemble Swin V2's: norms behind the branches, scaled cosines, biases from an MLP; the rest as `build_swin`.

    ``pretrained_window``: side of every stage's windows when the MLPs were trained, empty = as they are.
    """

    def block(stage: int, dim: int, heads: int, window: int, rate: float) -> Residual:
        bias = ContinuousBias(window, heads, pretrained_window[stage] if pretrained_window else window)
        qkv, none, hidden = QueryKeyValue(dim), nn.Identity(), RATIO * dim
        attention = WindowAttention(nn.Identity(), qkv, Linear(dim, dim), bias, CosineScores(heads))
        ffn = FeedForward(none, Linear(dim, hidden), none, Linear(hidden, dim))
        return Residual(PostNorm(attention, nn.LayerNorm(dim)), PostNorm(ffn, nn.LayerNorm(dim)), rate)

    def merge(dim: int) -> Merge:
        return Merge(PostNorm(Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(2 * dim)))

    return _build(image_px, PatchEmbed(patch, dim), depths, heads, window, drop_path, hide_token, block, merge)


def _build(
    size: Size,
    embed: PatchEmbed,
    depths: Sequence[int],
    heads: int,
    window: int,
    drop_path: float,
    hide_token: bool,
    block: Callable[[int, int, int, int, float], Residual],
    merge: Callable[[int], Merge],
) -> SwinTransformer:
    """Stages of blocks (stage, dim, heads, window, rate of stochastic depth), merged between them."""
    dim, depth = embed.out_channels, sum(depths)
    if dim % heads or window < 1:
        raise ConfigError(
            f"Swin needs dim divisible by heads and a window, got dim {dim}, heads {heads}, window {window}"
        )
    stages = []
    for s, grid in enumerate(grids(size, embed.kernel_size[0], len(depths))):
        width, side, first = dim * 2**s, min(window, *grid), sum(depths[:s])
        rates = [drop_path * i / max(1, depth - 1) for i in range(first, first + depths[s])]
        blocks = [block(s, width, heads * 2**s, side, rate) for rate in rates]
        stages.append(Stage(blocks, merge(width) if s + 1 < len(depths) else None, heads * 2**s, side))
    return SwinTransformer(embed, stages, dim * 2 ** (len(depths) - 1), hide_token)


def grids(size: Size, patch: int, stages: int) -> list[tuple[int, int]]:
    """Rows and columns of every stage's map: whole patches, then halved, rounded up."""
    height, width = sides(size)
    result = [(-(-height // patch), -(-width // patch))]
    for _ in range(stages - 1):
        rows, columns = result[-1]
        result.append((-(-rows // 2), -(-columns // 2)))
    return result
