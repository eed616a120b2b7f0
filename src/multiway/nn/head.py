"""What is read off tokens: ids of hidden ones, one vector of all, answers."""

from __future__ import annotations

from torch import Tensor, nn

from multiway.nn.linear import Linear


class TokenHead(nn.Module):
    """Scores of all ids at hidden places, as BERT: ``decoder(norm(GELU(dense(x))))``."""

    def __init__(self, dim: int, classes: int, eps: float) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.decoder = Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (M, D) -> (M, classes)."""
        return self.decoder(self.norm(nn.functional.gelu(self.dense(x))))


class Pooler(nn.Module):
    """``tanh(dense(norm(x)))`` of one token of every sample; ``norm``: ``nn.Identity()`` for none (BERT)."""

    def __init__(self, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.dense = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D) -> (B, D)."""
        return self.dense(self.norm(x)).tanh()


class AnswerHead(nn.Module):
    """Scores of answers to what was read: ``out(GELU(norm(dense(x))))``, as BEiT-3 and VLMo have it."""

    def __init__(self, dim: int, hidden: int, answers: int, eps: float) -> None:
        super().__init__()
        self.dense = Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.out = Linear(hidden, answers)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, dim) -> (B, answers)."""
        return self.out(nn.functional.gelu(self.norm(self.dense(x))))
