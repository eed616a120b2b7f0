"""What every model of pictures answers, so that one task serves them all."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from multiway.errors import ConfigError
from multiway.nn.pixels import Size, normalise
from multiway.plan import Tokens, dense_tokens


class ImageModel(nn.Module):
    """A model of pictures alone: ``encoder`` (blocks, ``width``, ``set_size``), a config, perhaps a classifier.

    ``config`` has ``image_px``, ``mean``, ``std``, ``classes`` and ``depth`` (all blocks). Systems say how they are
    assembled and initialised, and, where it is not the mean, what they classify from.
    """

    accepts: ClassVar[frozenset[frozenset[str]]] = frozenset({frozenset({"image"})})
    prefix: int = 1
    """Tokens in front of the patches that `encode` returns: a class token."""
    config: Any
    encoder: Any
    head: nn.Linear

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised float32; floats are taken as normalised."""
        return normalise(image, self.config.mean, self.config.std)

    def encode(self, *, image: Tensor, draws: Tensor | None = None) -> Tokens:
        """Final tokens of pictures, uint8 or normalised (B, 3, H, W); draws: (2 L, B) for stochastic depth, None =
        nothing dropped.
        """
        return dense_tokens(self.encoder(self.pixels(image), draws=draws))

    def patches(self, tokens: Tokens) -> Tensor:
        """The patches alone, row-major: (B, P, D)."""
        return tokens.dense("image")[0][:, self.prefix :]

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector per picture, (B, D), that a classifier reads."""
        raise TypeError(f"{type(self).__name__} does not say what it classifies from: define pool()")

    def classify(self, image: Tensor, draws: Tensor | None = None) -> Tensor:
        """Scores of all classes: (B, classes). Raises ConfigError for a model without a classifier."""
        if not self.config.classes:
            raise ConfigError(f"this {type(self).__name__} has no classifier: tune it with a classification recipe")
        return self.head(self.pool(self.encode(image=image, draws=draws)))

    def embed(self, tokens: Tokens, modality: str = "image") -> Tensor:
        """Unit vectors (B, D) of pictures; cosine is similarity."""
        return F.normalize(self.pool(tokens).float(), dim=-1)

    def set_image_size(self, image_px: Size) -> None:
        """Read pictures of another size (pixels, or rows and columns) from now on."""
        raise TypeError(f"{type(self).__name__} does not say how its positions are resized: define set_image_size()")

    @property
    def layers(self) -> int:
        """Number of blocks, for layer-wise learning rates."""
        return len(self.encoder.blocks)

    def layer_of(self, name: str) -> int:
        """0 for patches, positions and tokens, i + 1 for block i, depth + 1 for the rest: norm, heads, shared bias."""
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return 0 if name.startswith(("encoder.embed.", *self.encoder.TOKENS)) else self.layers + 1

    def no_decay(self, name: str) -> bool:
        """Matrices without weight decay: positions and class token."""
        return name.endswith(("positions", "cls_token"))
