"""Many tokens to one vector by attention: a query per sample looks at all tokens of the sample."""

from __future__ import annotations

from torch import Tensor, nn

from multiway.nn.attention import attend
from multiway.nn.linear import Linear, linear


class AttentionPool(nn.Module):
    """Multi-head attention of one query: (B, D) and tokens (B, N, D) -> (B, D').

    ``qkv``: D -> 3 D, of which the query takes the first third, keys and values the others; ``out``: D -> D'.
    """

    def __init__(self, dim: int, heads: int, out: int) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, out)
        self.heads = heads

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """query: (B, D), or (1, D) of all; tokens: (B, N, D) -> (B, D')."""
        count, length, dim = tokens.shape
        weight, bias = self.qkv.weight, self.qkv.bias
        q = linear(query, weight[:dim], bias[:dim]).expand(count, -1).view(count, 1, self.heads, -1).transpose(1, 2)
        kv = linear(tokens, weight[dim:], bias[dim:]).view(count, length, 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, N, C) each
        return self.out(attend(q, k, v, None).reshape(count, dim))
