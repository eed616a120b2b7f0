"""What every model answers that encodes pictures and texts apart, to compare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.errors import ConfigError
from multiway.nn.pixels import Size, normalise
from multiway.plan import Plan, Tokens, make_plan

BELOW = (
    "encoder.vision.trunk.", "encoder.vision.first_norm.", "encoder.vision.stem.", "encoder.language.words.",
    "encoder.language.positions",
)  # fmt: skip
"""What comes before the first block of either tower."""


class DualEncoder(nn.Module):
    """A tower of pictures and a tower of texts, side by side.

    ``vision(image, keep, draws)`` and ``language(ids, plan, draws)`` return tokens; both have ``blocks``,
    ``pool(tokens) -> (B, D)`` and a ``projection`` of that to the width that both share.
    """

    def __init__(self, vision: Any, language: Any) -> None:
        super().__init__()
        self.vision = vision
        self.language = language

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of both towers, pictures first."""
        return [*self.vision.blocks, *self.language.blocks]


class DualModel(nn.Module):
    """A dual encoder with its config (``image_px``, ``mean``, ``std``) and a learned temperature."""

    causal: ClassVar[bool] = False
    """Whether tokens of a text see none behind them."""
    config: Any
    encoder: DualEncoder
    logit_scale: nn.Parameter
    answer_head: nn.Linear
    """Of the texts' pooled vector, where ``config.answers`` is not 0."""

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised float32; floats are taken as normalised."""
        return normalise(image, self.config.mean, self.config.std)

    def encode(
        self, *, image: Tensor | None = None, text: Sequence[Tensor] | None = None, draws: Tensor | None = None
    ) -> Tokens:
        """Final tokens of pictures uint8 (B, 3, H, W), or of texts (int64 ids with their specials).

        draws: (2 L, B) for stochastic depth, None = nothing dropped. Raises ConfigError for both or neither.
        """
        if image is not None and text is None:
            return self.encoder.vision(self.pixels(image), None, self.own(draws, self.encoder.vision))
        if text is None or image is not None:
            raise ConfigError(f"{type(self).__name__} encodes pictures alone or texts alone: give one of them")
        lengths = {"text": {"text": [len(ids) for ids in text]}}
        plan = make_plan(lengths, causal_text=self.causal).to(self.logit_scale.device)
        return self.encoder.language(torch.cat(list(text)), plan, self.own(draws, self.encoder.language))

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector per picture, (B, D), before the projection: what a classifier reads."""
        return self.encoder.vision.pool(tokens)

    def embed(self, tokens: Tokens, modality: Literal["image", "text"]) -> Tensor:
        """Unit vectors (B, E) of pictures or texts; cosine is similarity."""
        tower = self.encoder.vision if modality == "image" else self.encoder.language
        return F.normalize(tower.projection(tower.pool(tokens)).float(), dim=-1)

    def answer(self, plan: Plan, *, text: Tensor, image: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """Scores of all answers to B texts, which have no pictures: (B, answers).

        plan: of texts alone; text: int64 (R,), packed; image: None, since no tower sees both; draws: (2 L, B) for
        stochastic depth. Raises ConfigError without a head of answers.
        """
        if not self.config.answers or image is not None:
            raise ConfigError(
                f"this {type(self).__name__} answers {'texts without pictures' if self.config.answers else 'nothing'}: "
                "tune it with a recipe such as _text first; pictures with texts need a joint encoder such as BEiT-3"
            )
        tower = self.encoder.language
        return self.answer_head(tower.pool(tower(text, plan, self.own(draws, tower))))

    def embed_pairs(
        self, plan: Plan, *, image: Tensor, text: Tensor, keep: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of pictures and of the texts that belong to them.

        plan: pictures alone, then texts alone; image: uint8 (B, 3, H, W); text: int64 (R,), packed; keep: int64 (B, K),
        the patches that are read at all, None = every patch; draws: (2 L, 2 B) for stochastic depth, pictures first.
        """
        seen, read = (None, None) if draws is None else (draws[:, : len(image)], draws[:, len(image) :])
        pictures = self.encoder.vision(self.pixels(image), keep, self.own(seen, self.encoder.vision))
        texts = self.encoder.language(text, plan.of("text"), self.own(read, self.encoder.language))
        return self.embed(pictures, "image"), self.embed(texts, "text")

    def own(self, draws: Tensor | None, tower: Any) -> Tensor | None:
        """The draws of a tower's blocks: the last, where the other has more."""
        return None if draws is None else draws[-2 * len(tower.blocks) :]

    def temperature(self) -> Tensor:
        """Factor on cosines, learned: (1,)."""
        return self.logit_scale.exp()

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size (pixels, or rows and columns) from now on: positions are interpolated."""
        self.encoder.vision.set_size(image_px)
        self.config = dataclasses.replace(self.config, image_px=image_px)

    @property
    def layers(self) -> int:
        """Number of blocks of the deeper tower, for layer-wise learning rates."""
        return max(len(self.encoder.vision.blocks), len(self.encoder.language.blocks))

    def layer_of(self, name: str) -> int:
        """0 for patches, stem, words and positions, ``layers`` for the last block of each tower, less below it, and
        ``layers`` + 1 for the rest.
        """
        names = {module: prefix for prefix, module in self.named_modules()}
        for tower in (self.encoder.vision, self.encoder.language):
            for i, block in enumerate(reversed(tower.blocks)):
                if name.startswith(f"{names[block]}."):
                    return self.layers - i
        return 0 if name.startswith(BELOW) else self.layers + 1

    def no_decay(self, name: str) -> bool:
        """Matrices without weight decay: those that are a lone vector."""
        return name.endswith(("cls_token", "probe"))
