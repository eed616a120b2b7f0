"""Patches: cutting a picture into a grid, embedding it, and putting it together again."""

from __future__ import annotations

from torch import Tensor, nn

from multiway.nn.linear import linear


def patchify(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, P, C * patch * patch), P row-major, each patch as (C, y, x); H and W multiples of patch."""
    b, c, h, w = image.shape
    x = image.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, P, C * patch * patch) -> (B, C, H, W) for a (rows, columns) grid."""
    b, (h, w) = len(patches), grid
    x = patches.reshape(b, h, w, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, -1, h * patch, w * patch)


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches to vectors: a convolution of stride ``patch``, run as one GEMM over all patches."""

    def __init__(self, patch: int, dim: int, channels: int = 3, bias: bool = True) -> None:
        super().__init__(channels, dim, patch, patch, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input: float (B, C, H, W) -> (B, P, D), P row-major."""
        patches = patchify(input, self.kernel_size[0])
        return linear(patches, self.weight.flatten(1), self.bias)
