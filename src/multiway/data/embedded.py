"""The embedded scenes as sources of records, beside those of an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multiway.data import builtin
from multiway.data.image import Decoder
from multiway.data.text import TextTokenizer


class Scenes:
    """The embedded scenes as a source of pairs."""

    kind = "pair"
    blocks = None
    home: Path | None = None

    def __init__(self, scenes: builtin.SceneSet, tokenizer: TextTokenizer) -> None:
        self.images = torch.from_numpy(scenes.images)
        self.captions = scenes.captions
        ids = iter(tokenizer.batch([caption for captions in scenes.captions for caption in captions]))
        self.ids = [[next(ids) for _ in captions] for captions in scenes.captions]

    def __len__(self) -> int:
        return len(self.images)

    def key(self, record: int) -> str:
        """Name of a scene."""
        return f"scene {record}"

    def label(self, record: int) -> None:
        """Scenes have no classes."""

    def image(self, record: int, px: int | None = None, decoder: Decoder = "pillow") -> Tensor:
        """The scene, uint8 (3, 64, 64)."""
        return self.images[record]

    def texts(self, record: int) -> list[np.ndarray]:
        """Its captions."""
        return self.ids[record]

    def window(self, record: int) -> np.ndarray:
        """Its first caption."""
        return self.ids[record][0]

    def strings(self, record: int) -> list[str]:
        """Its captions as text."""
        return list(self.captions[record])


class Digits:
    """Embedded scenes of one digit as a source of pictures, the digit being their class."""

    kind = "image"
    blocks = None
    home: Path | None = None

    def __init__(self, images: np.ndarray, digits: np.ndarray) -> None:
        self.images = torch.from_numpy(images)
        self.digits = digits

    def __len__(self) -> int:
        return len(self.images)

    def key(self, record: int) -> str:
        """Name of a scene."""
        return f"scene {record}"

    def label(self, record: int) -> int:
        """Its digit."""
        return int(self.digits[record])

    def image(self, record: int, px: int | None = None, decoder: Decoder = "pillow") -> Tensor:
        """The scene, uint8 (3, 64, 64)."""
        return self.images[record]

    def texts(self, record: int) -> list[np.ndarray]:
        """None."""
        return []

    def window(self, record: int) -> np.ndarray:
        """Nothing."""
        return np.empty(0, np.int64)

    def strings(self, record: int) -> list[str]:
        """None."""
        return []
