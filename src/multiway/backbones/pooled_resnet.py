"""A residual network in which averages do what strides do, pooled by attention (CLIP's, arXiv 2103.00020, 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.backbones.resnet import EXPANSION, normed_conv
from multiway.backbones.vit import whole_patches
from multiway.errors import ConfigError
from multiway.nn.pixels import Size
from multiway.nn.pool import AttentionPool
from multiway.nn.position import resize_positions
from multiway.plan import Tokens, dense_tokens

STRIDE = 32
"""Pixels of a side of a final cell."""
HEAD = 64
"""Width of a head of the pooling attention."""


class Bottleneck(nn.Module):
    """``shortcut(x) + conv3(pool(conv2(conv1(x))))``, each with its norm, ReLU between them and after the sum.

    ``pool``: the average over squares of ``stride``; the shortcut's comes before its convolution.
    """

    def __init__(self, width: int, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = normed_conv(width, dim, 1)
        self.conv2 = normed_conv(dim, dim, 3)
        self.conv3 = normed_conv(dim, EXPANSION * dim, 1)
        same = width == EXPANSION * dim and stride == 1
        self.shortcut = None if same else normed_conv(width, EXPANSION * dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, 4 dim, H / stride, W / stride)."""
        branch = self.conv3(self.pool(self.conv2(self.conv1(x).relu_()).relu_()))
        return branch.add_(x if self.shortcut is None else self.shortcut(self.pool(x))).relu_()

    def pool(self, x: Tensor) -> Tensor:
        """The average over squares."""
        return x if self.stride == 1 else F.avg_pool2d(x, self.stride)


class PooledResNet(nn.Module):
    """Normalised pictures -> the last stage's cells (B, P, 32 dim), and one vector (B, E) of them by attention.

    ``dim``: width of the stem; ``depths``: bottlenecks of the four stages. The query is the cells' mean, which stands
    in front of them, too, as keys and values; each has a learned position. As for batch norms see
    `multiway.backbones.resnet.ResNet`: while training, a picture's features depend on the others.
    """

    def __init__(self, image_px: Size, dim: int, depths: Sequence[int], out: int) -> None:
        super().__init__()
        self.stem = nn.ModuleList(
            [normed_conv(3, dim // 2, 3, 2), normed_conv(dim // 2, dim // 2, 3), normed_conv(dim // 2, dim, 3)]
        )
        self.stages = nn.ModuleList()
        width = dim
        for number, depth in enumerate(depths):
            stage = nn.ModuleList()
            for i in range(depth):
                stage.append(Bottleneck(width, dim << number, 2 if number and not i else 1))
                width = EXPANSION * dim << number
            self.stages.append(stage)
        self.width = width
        self.grid = whole_patches(image_px, STRIDE)
        self.positions = nn.Parameter(torch.zeros(1 + self.grid[0] * self.grid[1], width))
        self.attention = AttentionPool(width, width // HEAD, out)
        self.projection = nn.Identity()

    @property
    def blocks(self) -> list[nn.Module]:
        """All bottlenecks, in order."""
        return [block for stage in self.stages for block in stage]  # type: ignore[union-attr]

    def forward(self, image: Tensor, keep: Tensor | None = None, draws: Tensor | None = None) -> Tokens:
        """image: float (B, 3, H, W); keep: only None, a convolution reads all; draws: not used, no block is dropped.

        Raises ConfigError for ``keep``, and for pictures of another size.
        """
        if keep is not None:
            raise ConfigError("a ResNet reads whole pictures: only a ViT can read a share of the patches")
        if whole_patches((image.shape[2], image.shape[3]), STRIDE) != self.grid:
            raise ConfigError(
                f"pictures of {tuple(image.shape[2:])} pixels, expected another size: call set_image_size"
            )
        x = image.contiguous(memory_format=torch.channels_last)
        for conv in self.stem:
            x = conv(x).relu_()
        x = F.avg_pool2d(x, 2)
        for block in self.blocks:
            x = block(x)
        return dense_tokens(x.flatten(2).transpose(1, 2))

    def pool(self, tokens: Tokens) -> Tensor:
        """The attention of the mean: (B, E)."""
        cells = tokens.dense("image")[0]
        x = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + self.positions
        return self.attention(x[:, 0], x)

    def set_size(self, size: Size) -> None:
        """Read pictures of another size: the positions of the attention are interpolated bicubically."""
        grid = whole_patches(size, STRIDE)
        self.positions = nn.Parameter(resize_positions(self.positions.data, self.grid, grid, extra=1))
        self.grid = grid

    @torch.no_grad()
    def init_weights(self) -> None:
        """torch's defaults, positions and attention of deviation 1/sqrt(width), no first contribution of a block.

        Source: masked.md 8.1.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3[1].weight)  # type: ignore[arg-type]
        for weight in (self.positions, self.attention.qkv.weight, self.attention.out.weight):
            nn.init.normal_(weight, std=self.width**-0.5)
