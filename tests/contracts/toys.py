"""Every system at toy size, and batches for it: what the contract tests run over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import log
from typing import Any

import numpy as np
import torch
from torch import nn

from multiway.data.collate import DualCollate, MaskedCollate, Sample, Words
from multiway.data.hide import hide_patches
from multiway.data.pictures import LabelCollate, PictureCollate
from multiway.systems import mae, vit
from multiway.systems.beit3 import BEiT3, Config, MaskedAndContrast, MaskedDataModeling
from multiway.tasks.image_classification import ImageClassification
from multiway.tasks.retrieval import ImageTextContrast
from multiway.types import Batch, Objective

IMAGE_PX, PATCH, GRID, CODES, CLASSES = 32, 8, (4, 4), 19, 7
WORDS = Words(bos=0, eos=2, mask_id=3, first=4, stop=40, longest=14, window=14)
SIZES = {"dim": 32, "depth": 3, "heads": 4, "hidden": 64, "patch": PATCH, "image_px": IMAGE_PX, "codes": CODES}
DECOUPLED = Config(**SIZES, vocab=40, text_positions=16)
SHARED = dataclasses.replace(DECOUPLED, attention="shared", joint_layers=2)
COUNTS = {"image": 3, "pair": 4, "text": 5}


@dataclass(frozen=True)
class Toy:
    """An objective and its batches.

    ``untrained``: parameters it does not train; ``guess``: loss by term of a model that knows nothing; ``drops``:
    whether blocks may be dropped; ``published``: whether files of other programs hold such a model.
    """

    name: str
    build: Callable[[], Objective]
    collate: MaskedCollate | DualCollate | PictureCollate | LabelCollate
    kinds: tuple[str, ...]
    untrained: frozenset[str] = frozenset()
    guess: Mapping[str, float] = field(default_factory=dict)
    drops: bool = True
    published: bool = True

    def samples(self, seed: int = 0, counts: dict[str, int] | None = None) -> dict[str, list[Sample]]:
        """New samples by kind; ``counts``: how many of each, None = 3 images, 4 pairs, 5 texts."""
        counts = counts or {kind: COUNTS[kind] for kind in self.kinds}
        return {kind: [sample(seed, kind, i) for i in range(n)] for kind, n in counts.items()}

    def batch(self, seed: int = 0, counts: dict[str, int] | None = None) -> Batch:
        """A batch of new samples."""
        return self.collate(self.samples(seed, counts))


def sample(seed: int, kind: str, record: int) -> Sample:
    """A random record; texts have 0 to 11 words, the first of each batch none and the second eleven."""
    rng = np.random.default_rng([seed, ord(kind[0]), record])
    image = torch.from_numpy(rng.integers(0, 256, (3, IMAGE_PX, IMAGE_PX), dtype=np.uint8))
    lengths = {0: 0, 1: 11}
    text = rng.integers(WORDS.first, WORDS.stop, lengths.get(record, int(rng.integers(1, 9))))
    code = torch.from_numpy(rng.integers(0, CODES, GRID[0] * GRID[1]))
    return Sample(
        image=None if kind == "text" else image,
        text=None if kind == "image" else text,
        code=None if kind == "text" else code,
        label=int(rng.integers(CLASSES)),
        record=record,
        rng=rng,
    )


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded normals in every parameter, large enough that every part matters; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.2 * noise if around_one else 0.15 * noise)
    return model


MASKED = MaskedCollate(words=WORDS, grid=GRID)
DUAL = DualCollate(words=WORDS, grid=GRID)
BOTH = MaskedCollate(words=WORDS, grid=GRID, contrast=True, joint=0.5)
ALL = ("image", "pair", "text")
CONTRAST = dataclasses.replace(DECOUPLED, masked=False, contrast=True)
MASKED_CONTRAST = dataclasses.replace(DECOUPLED, contrast=True)
MASKED_GUESS = {"image": log(CODES), "pair_image": log(CODES), "text": log(40), "pair_text": log(40)}
PAIRED = (
    Toy("masked-decoupled", lambda: MaskedDataModeling(BEiT3(DECOUPLED), None), MASKED, ALL, guess=MASKED_GUESS),
    Toy(
        "masked-shared", lambda: MaskedDataModeling(BEiT3(SHARED), None), MASKED, ALL, guess=MASKED_GUESS,
        published=False,
    ),
    Toy(
        "masked-and-contrast", lambda: MaskedAndContrast(BEiT3(MASKED_CONTRAST), None), BOTH, ALL, guess=MASKED_GUESS
    ),
    # Contrast hides nothing; the released _itc files carry the mask token too.
    Toy(
        "contrast", lambda: ImageTextContrast(BEiT3(CONTRAST)), DUAL, ("pair",), frozenset({"model.vision.mask_token"})
    ),
)  # fmt: skip
"""Toys of pictures and texts."""

SHAPE = {"dim": 32, "depth": 3, "heads": 4, "hidden": 64, "patch": PATCH, "image_px": IMAGE_PX}
CLASSIFY = LabelCollate()
CLASS_GUESS = {"label": log(CLASSES)}


def classifier(name: str, build: Callable[[], nn.Module], **more: Any) -> Toy:
    """A toy that is tuned to classes."""
    return Toy(f"{name}-classifier", lambda: ImageClassification(build()), CLASSIFY, ("image",), **more)


def hiding(ratio: float, keep: bool = False) -> PictureCollate:
    """Batches with single patches hidden."""
    return PictureCollate(hide=partial(hide_patches, GRID, ratio), keep=keep)


PICTURED = (
    classifier("vit", lambda: vit.ViT(vit.Config(**SHAPE, classes=CLASSES)), guess=CLASS_GUESS),
    classifier("vit-mean", lambda: vit.ViT(vit.Config(**SHAPE, classes=CLASSES, pool="mean")), guess=CLASS_GUESS),
    Toy(
        "mae",
        lambda: mae.MaskedAutoencoding(
            mae.MAE(mae.Config(**SHAPE, decoder_dim=16, decoder_depth=2, decoder_heads=2))
        ),
        hiding(0.75, keep=True), ("image",), drops=False,
    ),
)  # fmt: skip
"""Toys of pictures alone."""

TOYS = PAIRED + PICTURED
