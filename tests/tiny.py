"""A random BEiT-3 of a few thousand parameters with its tokenizer, and pictures to show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from multiway.data.text import TextTokenizer
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained, create_model

COLOURS = ("red", "green", "blue", "white", "black")
CAPTIONS = [f"a {colour} square above a {other} circle" for colour in COLOURS for other in COLOURS]
SHAPE = {"dim": 32, "depth": 2, "heads": 2, "hidden": 64, "image_px": 32, "text_positions": 34, "codes": 8}


def tokenizer() -> TextTokenizer:
    """Trained on the captions."""
    return TextTokenizer.train(CAPTIONS, vocab=64, model="bpe")


def pretrained(seed: int = 0, **overrides: object) -> Pretrained:
    """Random, but the same for the same seed; with retrieval heads."""
    words = tokenizer()
    torch.manual_seed(seed)
    model = create_model("beit3_tiny_patch16_64", **{**SHAPE, "vocab": words.vocab, "contrast": True, **overrides})
    return Pretrained(model.eval(), words, Preprocessor.of(model.config, words, {"text_tokens": 16}))


def pictures(count: int, px: int = 40, seed: int = 0) -> list[Image.Image]:
    """Smooth random pictures, no two alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(x).resize((px, px + 8), Image.Resampling.BICUBIC) for x in small]


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Pictures as PNG files, every other with captions beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, picture in enumerate(pictures(count, seed=seed)):
        paths.append(folder / f"{i:03d}.png")
        picture.save(paths[-1])
        if i % 2:
            paths[-1].with_suffix(".txt").write_text(CAPTIONS[i % len(CAPTIONS)] + "\nanother\n")
    return paths
