"""Whether two things belong together, asked about the hardest wrong pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_others(scores: Tensor, own: Tensor, draw: Tensor) -> Tensor:
    """Choose for each of B things one of G that is not its partner, with probability softmax(scores): int64 (B,).

    scores: (B, G); own: int64 (B,), the partner's place; draw: uniform in [0, 1), (B,), the quantile that is taken. The
    choice depends on nothing else. Raises ValueError unless there are two to choose from. Source: ALBEF, VLMo
    (masked.md 5.3).
    """
    if scores.shape[1] < 2:
        raise ValueError("one pair has no others: matching needs two or more in a step")
    scores = scores.double().scatter(1, own[:, None], float("-inf"))
    shares = scores.softmax(1).cumsum(1)
    quantile = draw[:, None].double() * shares[:, -1:]
    return torch.searchsorted(shares, quantile, right=True)[:, 0]
