"""Image tokenizers: the contract ``image -> codes``, the simplest one that keeps it, and codebooks that are learned."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.errors import NumericsError
from multiway.nn.patch import patchify, unpatchify
from multiway.types import Across

SCORES = 2**26
"""Of places with codes that may exist at once."""

DECAY = 0.99
"""Of a codebook's running means."""

ROUNDS = 10
"""Of the k-means that places codes."""

WINDOW = 50
"""Steps over which the use of codes is measured; codes that nobody chose in one are dead."""

POOL = 4
"""Features of a step that are kept per code, for those that are to be placed among them."""

LEAST_USAGE, PATIENCE = 0.05, 3
"""Share of the codes that has to be in use; for so many windows in a row it may be less, thanks to revived codes."""


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


def nearest(x: Tensor, means: Tensor) -> Tensor:
    """Number of the mean with the largest inner product, in fp32, ties to the lower: (N, D), (K, D) -> int64 (N,)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        parts = x.split(max(1, SCORES // len(means)))
        return torch.cat([(part @ means.T).argmax(1) for part in parts])


def sums_of(x: Tensor, codes: Tensor, count: int) -> Tensor:
    """Sum of the rows (N, D) that chose each of ``count`` codes: (count, D), added in the same order every time."""
    return x.new_zeros(count, x.shape[1]).index_put((codes,), x, accumulate=True)


def spherical_means(x: Tensor, count: int) -> Tensor:
    """k-means by cosine over unit vectors: (N, D) -> (count, D), unit vectors.

    They start at rows that a fixed seed chooses, each of them repeatedly where there are fewer than ``count``; means
    that nobody chooses stay where they are.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    means = x[order.repeat(-(-count // len(x)))[:count].to(x.device)]
    for _ in range(ROUNDS):
        sums = sums_of(x, nearest(x, means), count)
        means = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=-1), means)
    return means


class Codebook(nn.Module):
    """Codes on the unit sphere, which follow the features that choose them (VQ-KD): buffers, not parameters.

    ``weight``: (codes, dim); ``cluster_size``: (codes,), running mean of the features per step that chose each;
    ``started``: (1,), 1 = codes were placed among features, 0 = at random. `CodebookUpdate` moves them.
    """

    weight: Tensor
    cluster_size: Tensor
    started: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(codes, dim))
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("started", torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Codes of unit vectors: (..., dim) -> int64 (...)."""
        return nearest(features.flatten(0, -2), self.weight).view(features.shape[:-1])

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random directions."""
        self.weight.copy_(F.normalize(torch.randn_like(self.weight), dim=-1))
        self.cluster_size.zero_()
        self.started.zero_()


class CodebookUpdate(nn.Module):
    """Moves a codebook after the features of each step, and sees to it that its codes stay in use.

    `collect` takes every micro-batch, `apply` follows once a step, and gives the same codebook on any number of
    processes and micro-batches. The first step places the codes by k-means; from then on each moves to the mean of the
    features that chose it, with a decay of .99. At the end of every window, codes that nobody chose in it are placed at
    features of that step. Source: masked.md 4.2; the revival is ours.

    ``chosen``: (2, codes), how often each was chosen in the last window and in the present one; ``low``: (1,), windows
    in a row in which too few were.
    """

    chosen: Tensor
    low: Tensor
    sums: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.zeros(2, codes, dtype=torch.float64))
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("sums", torch.zeros(codes, dim + 1), persistent=False)
        self.pool: list[Tensor] = []
        self.seen = self.expected = 0

    def init_weights(self) -> None:
        """Nothing was chosen yet."""
        self.chosen.zero_()
        self.low.zero_()

    @torch.no_grad()
    def collect(self, features: Tensor, codes: Tensor, expected: float, across: Across) -> None:
        """Note unit vectors (N, dim) and the codes they chose, int64 (N,), on every rank equally many; ``expected``:
        features of the whole step over all ranks.
        """
        if self.seen >= self.expected:  # a new step; the one before was applied, or skipped
            self._forget()
        counted = F.pad(features, (0, 1), value=1.0)
        self.sums += across.total(sums_of(counted, codes, len(self.sums)))
        stride = max(1, int(expected) // (POOL * len(self.sums)))
        self.pool.append(across.gather(features[::stride]))
        self.seen, self.expected = self.seen + across.world * len(features), int(expected)

    @torch.no_grad()
    def apply(self, codebook: Codebook, step: int) -> None:
        """Move the codes after step number ``step``; raises NumericsError when too few of them are in use for long."""
        pool = torch.cat(self.pool)
        pool = pool[(pool @ torch.arange(1.0, pool.shape[1] + 1, device=pool.device).sin()).argsort()]  # split or not
        sums, counts = self.sums[:, :-1], self.sums[:, -1]
        self._forget()
        if not codebook.started:
            codebook.weight.copy_(spherical_means(pool, len(sums)))
            codebook.started.fill_(1)
            return
        moved = F.normalize(codebook.weight.lerp(F.normalize(sums, dim=-1), 1 - DECAY), dim=-1)
        codebook.weight.copy_(torch.where(counts[:, None] > 0, moved, codebook.weight))
        codebook.cluster_size.lerp_(counts, 1 - DECAY)
        self.chosen[1] += counts
        if (step + 1) % WINDOW == 0:
            self.close_window(codebook, pool, step)

    def close_window(self, codebook: Codebook, pool: Tensor, step: int) -> None:
        """Place dead codes at features of the pool, (N, dim), and judge how many are in use."""
        dead = (self.chosen[1] == 0).nonzero()[:, 0]
        usage = 1 - len(dead) / len(codebook.weight)
        self.low.copy_(self.low + 1 if usage < LEAST_USAGE else 0 * self.low)
        if self.low >= PATIENCE:
            raise NumericsError(
                f"the codebook collapsed: in each of the last {PATIENCE} windows of {WINDOW} steps, up to step "
                f"{step + 1}, less than {LEAST_USAGE:.0%} of its {len(codebook.weight)} codes were chosen, in the last "
                f"{usage:.2%}. Take more pictures per step, a lower optim.lr, fewer codes, or a teacher whose features "
                "differ more"
            )
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(step))[: len(dead)]
        codebook.weight[dead[: len(order)]] = pool[order.to(pool.device)]
        self.chosen[0] = self.chosen[1]
        self.chosen[1].zero_()

    def usage(self) -> tuple[Tensor, Tensor]:
        """Share of the codes chosen in the last window and the present one, and the perplexity of that choice."""
        counts = self.chosen.sum(0)
        entropy = torch.special.entr(counts / counts.sum().clamp(min=1)).sum()
        return (counts > 0).float().mean(), entropy.exp().float()

    def _forget(self) -> None:
        """Begin a step."""
        self.sums = torch.zeros_like(self.sums)
        self.pool = []
        self.seen = self.expected = 0
