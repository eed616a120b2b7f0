"""Three encoders: of pictures, of texts, and one that reads both together from what the other two make of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from multiway.backbones.dual import DualEncoder
from multiway.backbones.multiway import MultiwayTransformer
from multiway.backbones.text import ALL, build_blocks
from multiway.backbones.vit import VisionTransformer, build_vit
from multiway.errors import ConfigError
from multiway.nn.block import Block
from multiway.nn.head import Pooler
from multiway.nn.linear import Linear
from multiway.nn.multiway import Multiway
from multiway.nn.pixels import Size
from multiway.nn.words import WordEmbedding
from multiway.plan import Plan, Tokens, dense_tokens

WORD_TYPES = 2
"""Rows of the table of types of words, of which the first is read."""


class Vision(nn.Module):
    """The encoder of pictures. ``projection``: of the class token, D -> E; ``pooler``: of the same, for answers."""

    def __init__(self, trunk: VisionTransformer, norm: nn.Module, out: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = norm
        self.pooler = Pooler(trunk.width, nn.Identity())
        self.projection = Linear(trunk.width, out)

    @property
    def blocks(self) -> nn.ModuleList:
        """The ViT's."""
        return self.trunk.blocks

    def forward(self, image: Tensor, keep: Tensor | None = None, draws: Tensor | None = None) -> Tokens:
        """image: float (B, 3, H, W); keep, draws: as `VisionTransformer` -> final tokens."""
        return dense_tokens(self.norm(self.trunk(image, keep=keep, draws=draws)))

    def pool(self, tokens: Tokens) -> Tensor:
        """The class token: (B, D)."""
        return tokens.prefix("image")

    def set_size(self, size: Size) -> None:
        """Read pictures of another size: bicubic, as transformers."""
        self.trunk.set_size(size, antialias=False)


class Language(MultiwayTransformer):
    """The encoder of texts, packed. ``projection``: of the first token, D -> E; ``pooler``: of the same."""

    def __init__(self, words: WordEmbedding, blocks: list[Block], norm: nn.Module, out: int) -> None:
        super().__init__(blocks, Multiway(lambda: norm, ALL))
        self.words = words
        self.pooler = Pooler(words.words.embedding_dim, nn.Identity())
        self.projection = Linear(words.words.embedding_dim, out)

    def states(self, ids: Tensor, plan: Plan, draws: Tensor | None = None) -> Tensor:
        """Rows after the last block, before the norm: ids int64 (R,), plan of texts alone -> (R, D).

        Raises ConfigError for a text that is longer than the positions.
        """
        length, longest = max(group.length for group in plan.groups), len(self.words.positions)
        if length > longest:
            raise ConfigError(f"a text has {length} tokens, this model reads at most {longest}")
        return self.run(self.words(ids, plan.position), plan, draws)

    def forward(self, ids: Tensor, plan: Plan, draws: Tensor | None = None) -> Tokens:  # type: ignore[override]
        """ids, plan: as `states` -> final tokens."""
        return Tokens(self.norm(self.states(ids, plan, draws), plan), plan)

    def normed(self, rows: Tensor) -> Tensor:
        """Some rows after the final norm: (M, D) -> (M, D)."""
        return self.norm.experts["shared"](rows)  # type: ignore[operator,index]

    def pool(self, tokens: Tokens) -> Tensor:
        """The first token: (B, D)."""
        return tokens.prefix("text")


class Joint(MultiwayTransformer):
    """The encoder of pictures with texts, over what both encoders have before their final norms."""

    def __init__(self, dim: int, blocks: list[Block], norm: nn.Module) -> None:
        super().__init__(blocks, Multiway(lambda: norm, ALL))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.from_image = Linear(dim, dim)
        self.from_text = Linear(dim, dim)
        self.pooler = Pooler(dim, nn.Identity())

    def forward(self, image: Tensor, text: Tensor, plan: Plan, draws: Tensor | None = None) -> Tokens:  # type: ignore[override]
        """image: (B, 1 + P, D); text: (R, D), packed; plan: of the B pairs, whose pictures have 2 + P tokens -> final
        tokens, a class token of the pair in front of each.
        """
        image = torch.cat([self.cls_token.expand(len(image), -1, -1).to(image.dtype), self.from_image(image)], dim=1)
        return super().forward(torch.cat([image.flatten(0, 1), self.from_text(text)]), plan, draws)


class JointEncoder(DualEncoder):
    """Encoders of pictures and of texts, and ``joint`` on top of both."""

    vision: Vision
    language: Language

    def __init__(self, vision: Vision, language: Language, joint: Joint) -> None:
        super().__init__(vision, language)
        self.joint = joint

    @property
    def blocks(self) -> list[nn.Module]:
        """Of pictures, of texts, of both."""
        return [*super().blocks, *self.joint.blocks]


def build_joint(
    *,
    image_px: Size,
    patch: int,
    vocab: int,
    longest: int,
    dim: int,
    heads: int,
    hidden: int,
    depths: tuple[int, int, int],
    out: int,
    drop_path: float,
    eps: float,
) -> JointEncoder:
    """Assemble them. ``longest``: most tokens of a text; ``depths``: blocks of the encoders of pictures, of texts, of
    both; ``out``: E; ``drop_path``: rate of the last block of each.
    """

    def norm() -> nn.Module:
        return nn.LayerNorm(dim, eps=eps)

    packed = partial(build_blocks, dim=dim, heads=heads, hidden=hidden, drop_path=drop_path, eps=eps)
    trunk = build_vit(
        image_px=image_px, patch=patch, dim=dim, depth=depths[0], heads=heads, hidden=hidden, drop_path=drop_path,
        eps=eps, hide_token=True,
    )  # fmt: skip
    words = WordEmbedding(vocab, dim, longest, WORD_TYPES, eps)
    return JointEncoder(
        Vision(trunk, norm(), out),
        Language(words, packed(depth=depths[1]), norm(), out),
        Joint(dim, packed(depth=depths[2]), norm()),
    )
