"""What attention looks at: how far, how evenly, and how differently from head to head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = 1e-12
"""Shares of attention below it count as so much in logarithms."""


class HeadStatistics(NamedTuple):
    """Of one layer, for every picture: float32.

    ``distance``: (B, H), how far a token looks on average, in the units of its places; ``entropy``: (B, H), in nats,
    0 = every token looks at one other, the logarithm of their number = at all alike; ``divergence``: (B,), mean over
    pairs of heads of the Kullback-Leibler divergence of their maps, of both directions, in nats, 0 = heads look alike;
    ``cosine``: (B,), mean over pairs of the cosine of their maps, 1 = alike. Both are NaN with one head.
    """

    distance: Tensor
    entropy: Tensor
    divergence: Tensor
    cosine: Tensor


def head_statistics(maps: Tensor, places: Tensor, real: Tensor) -> HeadStatistics:
    """Statistics of the maps of one layer.

    maps: (B, W, H, N, N), how much every token (row) looks at every other of its window; W is 1 where all see all.
    places: float (W, N, 2), where the tokens lie. real: bool (W, N), False = no patch (a class token, padding): such
    rows and columns are dropped, and what is left of a row is scaled to sum to 1. Means are over the real rows of all
    windows. Source: vision.md 10.
    """
    weight = real / real.sum()
    maps = maps.float() * real[:, None, None]
    maps = maps / maps.sum(-1, keepdim=True).clamp_min(FLOOR)
    apart = (places[:, :, None] - places[:, None]).norm(dim=-1)  # (W, N, N)
    distance = torch.einsum("bwhqk,wqk->bh", maps, apart * weight[..., None])
    logs = maps.clamp_min(FLOOR).log().transpose(1, 2).flatten(2)  # (B, H, W N N)
    cross = (maps * weight[:, None, :, None]).transpose(1, 2).flatten(2) @ logs.transpose(1, 2)  # (B, H, H)
    own = cross.diagonal(dim1=1, dim2=2)
    divergence = (own[:, :, None] + own[:, None] - cross - cross.transpose(1, 2)) / 2
    flat = F.normalize((maps * real[:, None, :, None]).transpose(1, 2).flatten(2), dim=-1)
    first, second = torch.triu_indices(maps.shape[2], maps.shape[2], 1, device=maps.device)
    pairs = (table[:, first, second].mean(-1) for table in (divergence, flat @ flat.transpose(1, 2)))
    return HeadStatistics(distance, -own, *pairs)
