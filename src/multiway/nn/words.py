"""Words as BERT embeds them: a table of words, one of positions, one of types, and a norm of their sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WordEmbedding(nn.Module):
    """Ids of packed texts -> rows. ``longest``: rows of the table of positions; ``types``: of that of types, of which
    every word is of the first; ``added``: whether positions are added (VLMo's are in its files and never read).
    """

    def __init__(self, vocab: int, dim: int, longest: int, types: int, eps: float, added: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, dim)
        self.positions = nn.Parameter(torch.zeros(longest, dim))
        self.types = nn.Parameter(torch.zeros(types, dim))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.added = added

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """ids, position (from 0): int64 (R,) -> (R, D)."""
        x = self.words(ids) + self.types[0]
        return self.norm(x + F.embedding(position, self.positions) if self.added else x)
