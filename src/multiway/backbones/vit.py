"""The plain Vision Transformer, which ViT, MAE, BEiT and CLIP share: patches, a class token, global attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from multiway.errors import ConfigError
from multiway.nn.activation import Activation
from multiway.nn.attention import SelfAttention
from multiway.nn.block import Residual
from multiway.nn.ffn import FeedForward, NormLinear
from multiway.nn.linear import Linear, QueryKeyValue
from multiway.nn.patch import PatchEmbed
from multiway.nn.pixels import Size, sides
from multiway.nn.position import resize_positions, sincos_positions
from multiway.nn.relative import RelativeBias


class VisionTransformer(nn.Module):
    """Normalised pictures -> class token and patches (B, 1 + P, D), row-major, before any final norm.

    ``positions``: (1 + P, D) added to them, learned (a parameter), fixed (a buffer) or None; ``bias``: one relative
    bias for all blocks, or None; ``hide_token``: whether hidden patches are replaced by a learned token;
    ``class_token``: whether there is one, else read 0 for 1 here and below.
    """

    TOKENS: ClassVar[tuple[str, ...]] = ("encoder.cls_token", "encoder.hide_token", "encoder.positions")
    """Parameters of layer 0, besides those of ``embed``."""

    positions: Tensor | None

    def __init__(
        self,
        embed: PatchEmbed,
        blocks: Sequence[nn.Module],
        grid: tuple[int, int],
        positions: Tensor | None,
        bias: RelativeBias | None,
        hide_token: bool,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        dim = embed.out_channels
        self.embed = embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.hide_token = nn.Parameter(torch.zeros(1, 1, dim)) if hide_token else None
        if positions is None or isinstance(positions, nn.Parameter):
            self.positions = positions
        else:
            self.register_buffer("positions", positions)
        self.bias = bias
        self.blocks = nn.ModuleList(blocks)
        self.grid = grid

    def forward(
        self,
        image: Tensor,
        hide: Tensor | None = None,
        keep: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:
        """image: float (B, C, H, W); hide: bool (B, P), True = replaced by ``hide_token``; keep: int64 (B, K), the
        patches that are read at all, None = all P; draws: (2 L, B) for stochastic depth, None = nothing dropped ->
        (B, 1 + K, D).
        """
        return self.run(self.tokens(image, hide, keep), draws)

    def tokens(self, image: Tensor, hide: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """What the first block reads: (B, 1 + K, D). Raises ConfigError for pictures of another size."""
        patch = self.embed.kernel_size[0]
        expected = self.grid[0] * patch, self.grid[1] * patch
        if image.shape[2:] != expected:
            raise ConfigError(f"pictures of {tuple(image.shape[2:])} pixels, expected {expected}: call set_image_size")
        x = self.embed(image.to(self.embed.weight.dtype))  # (B, P, D)
        if hide is not None:
            assert self.hide_token is not None, "built with hide_token"
            x = torch.where(hide[..., None], self.hide_token.to(x.dtype), x)
        if self.positions is not None:
            x = x + self.positions[self.prefix :]
        if keep is not None:
            x = x.take_along_dim(keep[..., None], dim=1)
        if self.cls_token is None:
            return x
        cls = self.cls_token if self.positions is None else self.cls_token + self.positions[0]
        return torch.cat([cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)

    def run(self, x: Tensor, draws: Tensor | None = None, blocks: slice = slice(None)) -> Tensor:
        """All blocks, or some, over (B, N, D); ``draws`` are those of all blocks."""
        bias = None if self.bias is None else self.bias()
        for i in range(len(self.blocks))[blocks]:
            own = None if draws is None else draws[2 * i : 2 * i + 2]
            x = self.blocks[i](x, own, bias)
        return x

    @property
    def prefix(self) -> int:
        """Number of class tokens in front of the patches: 1, or 0."""
        return 0 if self.cls_token is None else 1

    @property
    def width(self) -> int:
        """D."""
        return self.embed.out_channels

    def set_size(self, size: Size, antialias: bool) -> None:
        """Read pictures of another size: positions are interpolated bicubically, relative biases geometrically."""
        grid = whole_patches(size, self.embed.kernel_size[0])
        if self.positions is not None:
            table = resize_positions(self.positions.data, self.grid, grid, self.prefix, antialias)
            self.positions = nn.Parameter(table) if isinstance(self.positions, nn.Parameter) else table
        for module in self.modules():
            if isinstance(module, RelativeBias):
                module.resize(grid, "geometric")
        self.grid = grid


def whole_patches(size: Size, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture. Raises ConfigError when they are not whole."""
    height, width = sides(size)
    if height % patch or width % patch or not height or not width:
        raise ConfigError(f"pictures of {height}x{width} pixels are not whole patches of {patch}")
    return height // patch, width // patch


def check_shape(system: str, shape: Any) -> None:
    """Raise ConfigError unless ``shape.heads`` divides its ``dim``, and its ``patch`` the picture, ``image_px``."""
    if shape.dim % shape.heads:
        raise ConfigError(f"{system} needs dim divisible by heads, got dim {shape.dim}, heads {shape.heads}")
    whole_patches(shape.image_px, shape.patch)


def build_block(
    *,
    dim: int,
    heads: int,
    hidden: int,
    drop_rate: float = 0.0,
    eps: float = 1e-6,
    key_bias: bool = True,
    layer_scale: float = 0.0,
    bias: RelativeBias | None = None,
    activation: Activation = "gelu",
) -> Residual:
    """A pre-norm block; ``key_bias``: whether keys have one; ``layer_scale``: first value of the factors, 0 = none."""

    def norm() -> nn.Module:
        return nn.LayerNorm(dim, eps=eps)

    qkv = NormLinear(norm(), Linear(dim, 3 * dim) if key_bias else QueryKeyValue(dim))
    attention = SelfAttention(qkv, Linear(dim, dim), heads, bias)
    ffn = FeedForward(norm(), Linear(dim, hidden), nn.Identity(), Linear(hidden, dim), activation)
    return Residual(attention, ffn, drop_rate, (dim, layer_scale) if layer_scale else None)


def build_vit(
    *,
    image_px: Size,
    patch: int,
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    drop_path: float = 0.0,
    eps: float = 1e-6,
    positions: Literal["learned", "sincos", "none"] = "learned",
    bias: Literal["none", "shared", "layer"] = "none",
    key_bias: bool = True,
    layer_scale: float = 0.0,
    hide_token: bool = False,
    class_token: bool = True,
    patch_bias: bool = True,
    activation: Activation = "gelu",
    channels: int = 3,
) -> VisionTransformer:
    """Assemble one; ``bias``: relative position bias, one for all blocks or one each; the rest as `build_block`.

    ``drop_path``: rate of the last block, rising linearly from 0 at the first; ``patch_bias``: of their embedding.
    """
    grid = whole_patches(image_px, patch)
    prefix: Literal[0, 1] = 1 if class_token else 0
    table: Tensor | None = None
    if positions == "sincos":
        table = sincos_positions(dim, grid, prefix)
    elif positions == "learned":
        table = nn.Parameter(torch.zeros(prefix + grid[0] * grid[1], dim))
    blocks = [
        build_block(
            dim=dim, heads=heads, hidden=hidden, drop_rate=drop_path * i / max(1, depth - 1), eps=eps,
            key_bias=key_bias, layer_scale=layer_scale, activation=activation,
            bias=RelativeBias(grid, heads, prefix) if bias == "layer" else None,
        )
        for i in range(depth)
    ]  # fmt: skip
    shared = RelativeBias(grid, heads, prefix) if bias == "shared" else None
    embed = PatchEmbed(patch, dim, channels, patch_bias)
    return VisionTransformer(embed, blocks, grid, table, shared, hide_token, class_token)
