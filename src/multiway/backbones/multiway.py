"""The Multiway Transformer: a stack of blocks over packed rows, and a final norm per expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from multiway.nn.attention import Cache
from multiway.nn.block import Block
from multiway.plan import Plan, Tokens


class MultiwayTransformer(nn.Module):
    """Built blocks in order, then ``norm`` (which takes (rows, plan)); knows nothing of modalities."""

    def __init__(self, blocks: Sequence[Block], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, plan: Plan, draws: Tensor | None = None) -> Tokens:
        """x: (R, D) in plan order; draws: (2 L, S) uniform draws for stochastic depth, None = none -> Tokens."""
        for i, block in enumerate(self.blocks):
            own = None if draws is None else draws[2 * i : 2 * i + 2]
            x = block(x, plan, own)
        return Tokens(self.norm(x, plan), plan)

    def extend(self, x: Tensor, plan: Plan, cache: Cache, keep: Tensor | None = None) -> Tensor:
        """Final rows of new tokens that also see those in the cache, as `Attention.extend`: (R, D) -> (R, D)."""
        block: Any
        for layer, block in enumerate(self.blocks):
            x = x + block.attention.extend(x, plan, cache, layer, keep)
            x = x + block.ffn(x, plan)
        return self.norm(x, plan)
