"""The causal text tower of CLIP: packed texts without padding, one vector each from the end token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.backbones.multiway import MultiwayTransformer
from multiway.errors import ConfigError
from multiway.nn.activation import Activation
from multiway.nn.attention import Attention
from multiway.nn.block import Block
from multiway.nn.ffn import FeedForward, NormLinear
from multiway.nn.linear import Linear
from multiway.nn.multiway import Multiway
from multiway.plan import Plan, Tokens

ALL = ("shared",)
"""The experts of a tower that knows one modality."""


class TextTransformer(MultiwayTransformer):
    """Ids of packed texts -> final tokens, each of which saw the text up to itself.

    ``positions``: (longest, D); ``projection``: of the end token, D -> E.
    """

    def __init__(
        self, words: nn.Embedding, positions: nn.Parameter, blocks: list[Block], norm: nn.Module, projection: nn.Module
    ) -> None:
        super().__init__(blocks, Multiway(lambda: norm, ALL))
        self.words = words
        self.positions = positions
        self.projection = projection

    def forward(self, ids: Tensor, plan: Plan, draws: Tensor | None = None) -> Tokens:  # type: ignore[override]
        """ids: int64 (R,); plan: of texts alone, causal; draws: (2 L, B) for stochastic depth, None = nothing dropped.

        Raises ConfigError for a plan in which tokens see later ones, and for a text longer than the positions.
        """
        length = max(group.length for group in plan.groups)
        if length > len(self.positions):
            raise ConfigError(f"a text has {length} tokens, this model reads at most {len(self.positions)}")
        if any(group.length > 1 and (group.keep is None or group.keep.shape[2] == 1) for group in plan.groups):
            raise ConfigError("this text tower is causal: make its plans with causal_text=True (collate: causal=True)")
        x = self.words(ids) + F.embedding(plan.position, self.positions)
        return super().forward(x, plan, draws)

    def pool(self, tokens: Tokens) -> Tensor:
        """The last token of every text, which is its end token: (B, D)."""
        starts = tokens.plan.starts["text"]
        return tokens.rows(F.pad(starts[1:], (0, 1), value=tokens.plan.rows) - 1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights by width and depth. Source: masked.md 8.1; what it does not name is as torch has it."""
        depth, width = len(self.blocks), self.words.embedding_dim
        narrow = width**-0.5 * (2 * depth) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith((".attention.qkv.experts.shared.linear.bias", ".attention.out.experts.shared.bias")):
                nn.init.zeros_(parameter)
            elif name.endswith(".attention.qkv.experts.shared.linear.weight"):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith((".attention.out.experts.shared.weight", ".fc2.weight")):
                nn.init.normal_(parameter, std=narrow)
            elif name.endswith(".fc1.weight"):
                nn.init.normal_(parameter, std=(2 * width) ** -0.5)
        nn.init.normal_(self.projection.weight, std=width**-0.5)  # type: ignore[arg-type]


def build_text(
    *,
    vocab: int,
    longest: int,
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    out: int,
    drop_path: float = 0.0,
    eps: float = 1e-5,
    activation: Activation = "gelu",
) -> TextTransformer:
    """Assemble one; ``longest``: most tokens of a text; the rest as `build_blocks`."""
    blocks = build_blocks(
        dim=dim, depth=depth, heads=heads, hidden=hidden, drop_path=drop_path, eps=eps, activation=activation
    )
    positions, norm = nn.Parameter(torch.zeros(longest, dim)), nn.LayerNorm(dim, eps=eps)
    return TextTransformer(nn.Embedding(vocab, dim), positions, blocks, norm, Linear(dim, out, bias=False))


def build_blocks(
    *, dim: int, depth: int, heads: int, hidden: int, drop_path: float, eps: float, activation: Activation = "gelu"
) -> list[Block]:
    """Pre-norm blocks over packed rows of one modality; ``drop_path``: rate of the last block, rising from 0."""

    def norm() -> nn.Module:
        return nn.LayerNorm(dim, eps=eps)

    def ffn() -> FeedForward:
        return FeedForward(norm(), Linear(dim, hidden), nn.Identity(), Linear(hidden, dim), activation)

    blocks = []
    for layer in range(depth):
        qkv = Multiway(lambda: NormLinear(norm(), Linear(dim, 3 * dim)), ALL)
        attention = Attention(qkv, Multiway(lambda: Linear(dim, dim), ALL), heads)
        blocks.append(Block(attention, Multiway(ffn, ALL), drop_path * layer / max(1, depth - 1)))
    return blocks
