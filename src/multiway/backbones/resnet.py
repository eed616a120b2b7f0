"""The plain residual network (He et al., 2015, arXiv 1512.03385), bottlenecks of convolutions and batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM_STRIDE = 4
EXPANSION = 4
"""How many times wider a bottleneck's ends are than its middle."""


class Bottleneck(nn.Module):
    """``shortcut(x) + conv3(conv2(conv1(x)))``, each with its norm, ReLU between them and after the sum.

    The 3x3 convolution in the middle has the stride, as in torchvision's (called v1.5 elsewhere).
    """

    def __init__(self, width: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = normed_conv(width, dim, 1)
        self.conv2 = normed_conv(dim, dim, 3, stride)
        self.conv3 = normed_conv(dim, EXPANSION * dim, 1)
        same = width == EXPANSION * dim and stride == 1
        self.shortcut = None if same else normed_conv(width, EXPANSION * dim, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, 4 dim, H / stride, W / stride)."""
        branch = self.conv3(self.conv2(self.conv1(x).relu_()).relu_())
        return branch.add_(x if self.shortcut is None else self.shortcut(x)).relu_()


class ResNet(nn.Module):
    """Normalised pictures -> the last stage's cells (B, P, D), row-major.

    ``hide_token``: whether hidden patches, of 4x4 pixels, are replaced by a learned token: their pixels are set to the
    mean before the stem, whose windows overlap, and the stem's output at them to the token.

    Batch norms see all pictures of a forward: while training, a picture's features depend on the others, so the loss of
    a batch is not the sum of its parts' (accumulation changes it, and every process has statistics of its own). Their
    running statistics are buffers, so they are saved; every training forward moves them by a tenth, twice where
    activations are recomputed; those of the first process are kept. In evaluation pictures are independent.
    """

    TOKENS: ClassVar[tuple[str, ...]] = ("encoder.hide_token",)

    def __init__(self, dim: int, depths: Sequence[int], hide_token: bool) -> None:
        super().__init__()
        self.embed = normed_conv(3, dim, 7, 2)
        self.hide_token = nn.Parameter(torch.zeros(1, 1, dim)) if hide_token else None
        blocks = []
        width = dim
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(Bottleneck(width, dim << stage, 2 if stage and not i else 1))
                width = EXPANSION * dim << stage
        self.blocks = nn.ModuleList(blocks)
        self.width = width

    def forward(self, image: Tensor, hide: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """image: float (B, 3, H, W); hide: bool (B, P), True = replaced by ``hide_token``; draws: not used, no block is
        dropped -> (B, P', D).
        """
        x = image.contiguous(memory_format=torch.channels_last)
        rows, columns = (side // STEM_STRIDE for side in image.shape[2:])
        if hide is not None:
            patches = hide.view(-1, 1, rows, 1, columns, 1).expand(-1, -1, -1, STEM_STRIDE, -1, STEM_STRIDE)
            x = x.masked_fill(patches.reshape(-1, 1, *image.shape[2:]), 0.0)
        x = F.max_pool2d(self.embed(x).relu_(), 3, 2, 1)
        if hide is not None:
            assert self.hide_token is not None, "built with hide_token"
            x = torch.where(hide.view(-1, 1, rows, columns), self.hide_token.to(x.dtype).view(1, -1, 1, 1), x)
        for block in self.blocks:
            x = block(x)
        return x.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def init_weights(self) -> None:
        """He's normal weights by the number of outputs, norms 1 and 0, the token of deviation .02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        if self.hide_token is not None:
            nn.init.normal_(self.hide_token, std=0.02)


def normed_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch norm, padded so that a stride of 1 keeps the size."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
