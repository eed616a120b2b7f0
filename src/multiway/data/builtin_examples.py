"""Embedded examples of tasks: questions, statements and sentences about generated scenes, whose answers are exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multiway.data import builtin
from multiway.data.builtin_language import COLOURS, DIGITS, Scene, article, write_captions
from multiway.data.image import Decoder
from multiway.data.order import generator
from multiway.data.text import TextTokenizer

PER_SCENE = 4
"""Questions about one scene."""

UNSEEN = ("was written by a child", "was written in a hurry", "was written with a new pen", "is older than the picture")
"""What no picture tells."""


class Row(NamedTuple):
    """An example: numbers of its scenes, its texts, its answer."""

    scenes: tuple[int, ...]
    texts: tuple[str, ...]
    answer: str


class SceneExamples:
    """Examples about embedded scenes as a source; answers are numbers into ``labels``."""

    kind = "example"
    blocks = None
    home: Path | None = None

    def __init__(
        self, images: np.ndarray, rows: Sequence[Row], labels: Sequence[str], tokenizer: TextTokenizer
    ) -> None:
        self.rows = rows
        self._images = torch.from_numpy(images)
        self._numbers = {name: i for i, name in enumerate(labels)}
        ids = iter(tokenizer.batch([text for row in rows for text in row.texts]))
        self._ids = [tuple(next(ids) for _ in row.texts) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        """Its number."""
        return str(i)

    def pictures(self, i: int) -> int:
        """How many pictures the example has."""
        return len(self.rows[i].scenes)

    def images(self, i: int, px: int | None = None, decoder: Decoder = "pillow") -> list[Tensor]:
        """Its scenes, uint8 (3, 64, 64) each."""
        return [self._images[scene] for scene in self.rows[i].scenes]

    def texts(self, i: int) -> tuple[np.ndarray, ...]:
        """Ids of its texts, without specials."""
        return self._ids[i]

    def strings(self, i: int) -> tuple[str, ...]:
        """Its texts."""
        return self.rows[i].texts

    def answers(self, i: int) -> tuple[int, ...]:
        """The number of its answer."""
        return (self._numbers[self.rows[i].answer],)


def make(task: str, split: builtin.Split, count: int, seed: int = 0) -> tuple[np.ndarray, list[Row]]:
    """Pictures uint8 (count, 3, 64, 64) and the examples about them: a pure function of the arguments.

    ``task``: ``vqa``, ``nlvr2``, ``entailment`` or ``text_classification``.
    """
    found = builtin.scenes(split, count, seed=seed)
    ask: Callable[[list[Scene], np.random.Generator], Iterator[Row]] = ASK[task]
    return found.images, list(ask([found[i] for i in range(count)], generator(seed, "examples", split, task)))


def _questions(scenes: list[Scene], rng: np.random.Generator) -> Iterator[Row]:
    """Some of the questions that a scene answers."""
    for number, scene in enumerate(scenes):
        asked = builtin.questions(scene)
        for i in rng.permutation(len(asked))[:PER_SCENE].tolist():
            yield Row((number,), (asked[i][0],), asked[i][1])


def _statements(scenes: list[Scene], rng: np.random.Generator) -> Iterator[Row]:
    """What is said of every scene and the next one."""
    for number in range(len(scenes) - 1):
        text, truth = builtin.statement(scenes[number], scenes[number + 1])
        yield Row((number, number + 1), (text,), str(truth))


def _hypotheses(scenes: list[Scene], rng: np.random.Generator) -> Iterator[Row]:
    """Of every scene: something it shows, something it does not show, something it cannot show."""
    for number, scene in enumerate(scenes):
        names = [o.name for o in scene.objects]
        absent = sorted({article(f"{c} {word}") for c in COLOURS for word in DIGITS} - set(names))
        shown, other = names[rng.integers(len(names))], absent[rng.integers(len(absent))]
        yield Row((number,), (f"there is {shown}",), "entailment")
        yield Row((number,), (f"there is {other}",), "contradiction")
        told = f"{names[rng.integers(len(names))]} {UNSEEN[rng.integers(len(UNSEEN))]}"
        yield Row((number,), (told,), "neutral")


def _paraphrases(scenes: list[Scene], rng: np.random.Generator) -> Iterator[Row]:
    """Two captions of every scene, and one of it beside one of a scene in which a single digit is another."""
    for scene in scenes:
        first, second, third = scene.captions[:3]
        yield Row((), (first, second), "same")
        objects = list(scene.objects)
        changed = int(rng.integers(len(objects)))
        digit = (objects[changed].digit + 1 + int(rng.integers(9))) % 10
        objects[changed] = dataclasses.replace(objects[changed], digit=digit)
        yield Row((), (third, write_captions(tuple(objects), scene.cells, rng)[0]), "different")


ASK = {
    "vqa": _questions,
    "nlvr2": _statements,
    "entailment": _hypotheses,
    "text_classification": _paraphrases,
}
"""Who asks for each task."""
