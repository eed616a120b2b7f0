"""Image tokenizers: the contract ``image -> codes`` and the simplest one that keeps it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multiway.nn.patch import patchify, unpatchify


class ImageTokenizer(Protocol):
    """What hands masked image modelling its targets."""

    codes: int
    """Size of the vocabulary."""

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> int64 (B, P): the visual token of every patch, P row-major."""
        ...


class PatchCodebook(nn.Module):
    """Every patch is named after the nearest of ``codes`` mean patches (k-means on pixels).

    The centroids (codes, 3 * patch * patch) in [0, 1] are a buffer: data, not trained. The place of BEiT-2's VQ-KD
    tokenizer with nothing to train: fitted in seconds by `multiway.data.prepare.fit_patch_codebook`.
    """

    centroids: Tensor

    def __init__(self, codes: int, patch: int) -> None:
        super().__init__()
        self.codes = codes
        self.patch = patch
        self.register_buffer("centroids", torch.zeros(codes, 3 * patch * patch))

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> int64 (B, P), nearest centroid in squared distance, ties to the lower number."""
        with torch.autocast(image.device.type, enabled=False):
            patches = patchify(image, self.patch).to(self.centroids.dtype).div(255)
            half = self.centroids.square().sum(1) / 2
            return (patches @ self.centroids.T - half).argmax(-1)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """int64 (B, P) on a (rows, columns) grid -> uint8 (B, 3, H, W), every patch drawn as its centroid."""
        return unpatchify(self.centroids[codes], self.patch, grid).mul(255).round().clamp(0, 255).to(torch.uint8)

    def load_centroids(self, centroids: np.ndarray) -> PatchCodebook:
        """Take fitted centroids, float (codes, 3 * patch * patch) in [0, 1]; returns self."""
        self.centroids.copy_(torch.from_numpy(centroids))
        return self
