"""The Multiway Transformer: a stack of blocks over packed rows, and a final norm per expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from multiway.nn.attention import Cache
from multiway.nn.block import Block
from multiway.plan import Plan, Tokens

Biases = Sequence[Mapping[str, Tensor]]
"""Of every block, by kind of sample: float (H, N, N), added to the scores of attention."""


class MultiwayTransformer(nn.Module):
    """Built blocks in order, then ``norm`` (which takes (rows, plan)); knows nothing of modalities."""

    def __init__(self, blocks: Sequence[Block], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, plan: Plan, draws: Tensor | None = None, biases: Biases | None = None) -> Tokens:
        """x: (R, D) in plan order; draws: (2 L, S) uniform draws for stochastic depth, None = none; biases: of the
        attention of every block, None = none -> Tokens.
        """
        return Tokens(self.norm(self.run(x, plan, draws, biases), plan), plan)

    def run(
        self,
        x: Tensor,
        plan: Plan,
        draws: Tensor | None = None,
        biases: Biases | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Rows after the blocks from ``start`` to before ``stop`` (None = the last one), without the final norm; draws
        and biases are those of all blocks: (R, D) -> (R, D).
        """
        for i in range(len(self.blocks))[start:stop]:
            own = None if draws is None else draws[2 * i : 2 * i + 2]
            x = self.blocks[i](x, plan, own, None if biases is None else biases[i])
        return x

    def extend(self, x: Tensor, plan: Plan, cache: Cache, keep: Tensor | None = None) -> Tensor:
        """Final rows of new tokens that also see those in the cache, as `Attention.extend`: (R, D) -> (R, D)."""
        block: Any
        for layer, block in enumerate(self.blocks):
            x = x + block.attention.extend(x, plan, cache, layer, keep)
            x = x + block.ffn(x, plan)
        return self.norm(x, plan)
