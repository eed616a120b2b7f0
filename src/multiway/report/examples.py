"""What a trained model does with held-out scenes: examples for people to look at, and the figure over all beside them.

The examples are the first scenes of the set, not the best ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multiway.data import builtin
from multiway.nn.quantize import PatchCodebook
from multiway.plan import make_plan
from multiway.pretrained import Pretrained
from multiway.tasks.fill import fill_patches
from multiway.tasks.zero_shot import classifier
from multiway.types import Batch, move

BATCH = 250
"""Scenes computed at once."""

TOLD = frozenset(builtin.COLOURS) | frozenset(builtin.DIGITS)
"""Words that only the picture can tell: they are hidden."""

TAILS = ",:"


@dataclass(frozen=True)
class Pictures:
    """Scenes with one cell hidden, filled in without and with the caption.

    Pictures are uint8 (N, 3, H, W), drawn by the codebook where they were hidden, ``best`` by the right visual tokens.
    ``hide``: bool (N, P); ``box``: per scene the cell hidden, (row, column); ``right``, ``right_told``: share in [0, 1]
    of the hidden patches with handwriting whose visual token is named right, without and with the caption.
    """

    original: np.ndarray
    alone: np.ndarray
    told: np.ndarray
    best: np.ndarray
    hide: np.ndarray
    box: list[tuple[int, int]]
    right: float
    right_told: float


@dataclass(frozen=True)
class Word:
    """A word of a caption and the comma or colon after it; a hidden one with what the model put there without and with
    the picture."""

    text: str
    tail: str = ""
    hidden: bool = False
    alone: str = ""
    told: str = ""


@dataclass(frozen=True)
class Captions:
    """Captions with words hidden; ``right``: the share of hidden ``words``, ``colours`` and ``digits`` that are named
    right, in [0, 1], without and with the picture."""

    words: list[list[Word]]
    right: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Examples:
    """Everything shown. ``image``, ``text``: unit vectors (N, D) of scenes and captions; ``confusion``: int64 (10, 10),
    one-digit scenes by digit written and digit named."""

    scenes: builtin.SceneSet
    captions: list[str]
    pictures: Pictures
    words: Captions
    image: np.ndarray
    text: np.ndarray
    confusion: np.ndarray


def collect(ready: Pretrained, codebook: PatchCodebook, count: int, seed: int) -> Examples:
    """Let a model fill in, find and name: the ``count`` held-out scenes that its evaluation used."""
    scenes = builtin.retrieval_scenes(count, seed)
    captions = [captions[0] for captions in scenes.captions]
    return Examples(
        scenes=scenes,
        captions=captions,
        pictures=fill_pictures(ready, codebook, scenes, captions),
        words=fill_words(ready, scenes, captions),
        image=ready.encode_image(torch.from_numpy(scenes.images)).numpy(),
        text=ready.encode_text(captions).numpy(),
        confusion=confuse(ready, count, seed),
    )


def fill_pictures(
    ready: Pretrained, codebook: PatchCodebook, scenes: builtin.SceneSet, captions: Sequence[str]
) -> Pictures:
    """Hide the cell of one digit of every scene, and predict its patches, without and with the caption."""
    model: Any = ready.model
    grid, patch, images = model.config.grid, codebook.patch, torch.from_numpy(scenes.images)
    chosen = [objects[i % len(objects)] for i, objects in enumerate(scenes.objects)]
    box = [(o.row, o.column) for o in chosen]
    side = grid[0] // scenes.cells
    hide = torch.zeros(len(scenes), *grid, dtype=torch.bool)
    for own, (row, column) in zip(hide, box, strict=True):
        own[row * side : (row + 1) * side, column * side : (column + 1) * side] = True
    over = hide[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    hide = hide.flatten(1)
    codes = codebook(images)

    def fill(texts: Sequence[Tensor] | None) -> Tensor:
        found = [fill_patches(model, batch).cpu() for batch in batches(ready, images, texts, hide)]
        return codes.masked_scatter(hide, torch.cat(found))

    def draw(filled: Tensor) -> np.ndarray:
        return torch.where(over, codebook.decode(filled, grid), images).numpy()

    alone, told = fill(None), fill(framed(ready, captions))
    inked = hide & torch.from_numpy(builtin.ink_patches(scenes, patch))
    right, right_told = (float((filled == codes)[inked].float().mean()) for filled in (alone, told))
    return Pictures(scenes.images, draw(alone), draw(told), draw(codes), hide.numpy(), box, right, right_told)


def fill_words(ready: Pretrained, scenes: builtin.SceneSet, captions: Sequence[str]) -> Captions:
    """Hide every colour and every digit of the captions, and predict them without and with the picture."""
    tokenizer = ready.tokenizer
    assert tokenizer is not None, "a trained model has a tokenizer"
    split = [caption.split(" ") for caption in captions]
    pieces = [tokenizer.batch(words) for words in split]
    hides = [[word.rstrip(TAILS) in TOLD for word in words] for words in split]
    texts, hidden = [], []
    for own, hide in zip(pieces, hides, strict=True):
        flags = np.concatenate([np.full(len(ids), flag) for ids, flag in zip(own, hide, strict=True)])
        ids = np.where(flags, tokenizer.hide, np.concatenate(own))
        texts.append(torch.tensor([tokenizer.bos, *ids, tokenizer.eos]))
        hidden.append(torch.tensor([False, *flags, False]))
    images = torch.from_numpy(scenes.images)
    guesses = [name_words(ready, given, texts, hidden) for given in (None, images)]
    lines = []
    for words, own, hide in zip(split, pieces, hides, strict=True):
        line = []
        for word, ids, flag in zip(words, own, hide, strict=True):
            text = word.rstrip(TAILS)
            put = [tokenizer.text([next(guess) for _ in ids]).rstrip(TAILS) for guess in guesses] if flag else ["", ""]
            line.append(Word(text, word[len(text) :], flag, *put))
        lines.append(line)
    asked = [word for line in lines for word in line if word.hidden]
    right = {}
    for name, kind in (("words", TOLD), ("colours", builtin.COLOURS), ("digits", builtin.DIGITS)):
        hits = [(word.alone == word.text, word.told == word.text) for word in asked if word.text in kind]
        alone, told = np.mean(hits, axis=0).tolist()
        right[name] = alone, told
    return Captions(lines, right)


@torch.inference_mode()
def name_words(
    ready: Pretrained, images: Tensor | None, texts: Sequence[Tensor], hidden: Sequence[Tensor]
) -> Iterator[int]:
    """The most likely id at every hidden place of the texts, one after the other."""
    model: Any = ready.model
    found = []
    for number, batch in enumerate(batches(ready, images, texts)):
        places = torch.cat(list(hidden[number * BATCH : (number + 1) * BATCH])).nonzero()[:, 0].to(ready.device)
        tokens = model(batch["plan"], image=batch.get("image"), text=batch["text"])
        found.append(model.text_logits(tokens, places).argmax(-1).cpu())
    return iter(torch.cat(found).tolist())


def framed(ready: Pretrained, captions: Sequence[str]) -> list[Tensor]:
    """Captions as ids with both specials."""
    tokenizer = ready.tokenizer
    assert tokenizer is not None, "a trained model has a tokenizer"
    return [torch.tensor([tokenizer.bos, *ids, tokenizer.eos]) for ids in tokenizer.batch(captions)]


def batches(
    ready: Pretrained, images: Tensor | None, texts: Sequence[Tensor] | None, hide: Tensor | None = None
) -> Iterator[Batch]:
    """Pictures, texts or both, in the order given; ``hide``: bool (N, P), the patches not to be seen."""
    count = len(images) if images is not None else len(texts or ())
    shape: Any = ready.model.config
    rows, columns = shape.grid
    for first in range(0, count, BATCH):
        part = slice(first, first + BATCH)
        lengths, batch = {}, {}
        if images is not None:
            batch["image"] = images[part]
            lengths["image"] = [rows * columns + 1] * len(batch["image"])
        if texts is not None:
            batch["text"] = torch.cat(list(texts[part]))
            lengths["text"] = [len(ids) for ids in texts[part]]
        if hide is not None:
            batch["image_hide"] = hide[part]
            batch["image_hidden"] = hide[part].flatten().nonzero()[:, 0]
        kind = "pair" if len(lengths) == 2 else next(iter(lengths))
        yield move({"plan": make_plan({kind: lengths}), **batch}, ready.device)


def without_digits(scenes: builtin.SceneSet) -> float:
    """Recall@1, in [0, 1], of one who sees every colour and place but cannot read a digit, ties broken at random."""
    looks = [frozenset((o.colour, o.row, o.column) for o in objects) for objects in scenes.objects]
    alike = Counter(looks)
    return sum(1 / alike[look] for look in looks) / len(looks)


def confuse(ready: Pretrained, count: int, seed: int) -> np.ndarray:
    """How often each digit of one-digit scenes is named as each: int64 (10, 10), written x named, by prompts alone."""
    scenes, digits = builtin.one_digit_scenes(count, seed)
    classes = classifier(ready.encode_text, builtin.digit_prompts())
    named = (ready.encode_image(torch.from_numpy(scenes.images)) @ classes.T).argmax(-1).numpy()
    table = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(table, (digits, named), 1)
    return table
