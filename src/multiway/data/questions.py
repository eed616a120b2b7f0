"""From the settings of a run to examples of a task: which records, which answers, which tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from multiway.data.builtin_examples import SceneExamples, make
from multiway.data.collate import Words
from multiway.data.examples import Examples
from multiway.data.prepare import index_of, words_of
from multiway.data.text import TextTokenizer
from multiway.errors import DataError
from multiway.run import Data

SCENES, HELD_OUT_SCENES = 8000, 500
"""Embedded scenes that are asked about while training, and by other writers."""

LISTED = 3
"""Records named in an error about many."""

Source = Examples | SceneExamples


@dataclass(frozen=True, kw_only=True)
class ExampleCorpus:
    """Examples, the names of their answers by number, the tokenizer of their texts, and a hash of it all."""

    sources: Sequence[Source]
    labels: tuple[str, ...]
    tokenizer: TextTokenizer
    hash: str

    @cached_property
    def records(self) -> list[tuple[Source, int]]:
        """All examples as their sources and numbers."""
        return [(source, i) for source in self.sources for i in range(len(source))]

    @cached_property
    def pictures(self) -> int:
        """How many pictures every example has. Raises DataError when they differ."""
        found = {source.pictures(i): (source, i) for source, i in self.records}
        if len(found) > 1:
            told = ", ".join(f"{source.key(i)} has {n}" for n, (source, i) in sorted(found.items()))
            raise DataError(f"examples have different numbers of pictures: {told}; expected as many of each")
        return next(iter(found))

    def words(self, data: Data) -> Words:
        """What collate needs to know of the vocabulary."""
        return words_of(self.tokenizer, data.text_tokens, data.window)

    def require_answers(self) -> None:
        """Raise DataError unless every example has an answer."""
        if without := [source.key(i) for source, i in self.records if not source.answers(i)]:
            first = "".join(f"\n  {key}" for key in without[:LISTED])
            raise DataError(
                f"{len(without)} of {len(self.records)} examples have no answer, but training needs one of each. The "
                f"first:{first}"
            )


def scene_examples(
    task: str, seed: int, *, tokenizer: TextTokenizer | str | None = None, held_out: bool = False
) -> ExampleCorpus:
    """Embedded examples about scenes of the training writers, or of those held out.

    ``tokenizer``: one, or its file; None = trained on the texts.
    """
    images, rows = make(task, "eval", HELD_OUT_SCENES, seed) if held_out else make(task, "train", SCENES, seed)
    if isinstance(tokenizer, str):
        tokenizer = TextTokenizer.load(tokenizer)
    tokenizer = tokenizer or TextTokenizer.train((text for row in rows for text in row.texts), vocab=512, model="bpe")
    labels = tuple(sorted({row.answer for row in rows}))
    digest = hashlib.sha256(images.tobytes())
    digest.update(repr([tokenizer.hash, rows]).encode())
    source = SceneExamples(images, rows, labels, tokenizer)
    return ExampleCorpus(sources=[source], labels=labels, tokenizer=tokenizer, hash=digest.hexdigest())


def open_examples(
    data: Data, task: str, folder: Path, split: str | None = None, tokenizer: TextTokenizer | None = None
) -> ExampleCorpus:
    """The indexed examples of ``data.root``; what is not an index of them yet is indexed below ``folder``.

    ``split``: None = the training split where there are several; ``tokenizer``: None = ``data.tokenizer``, else the
    index's own. Raises ConfigError for an index of something else, DataError (65) over ``data.max_bad``.
    """
    assert data.root is not None, "a root is indexed"
    if tokenizer is None and data.tokenizer:
        tokenizer = TextTokenizer.load(data.tokenizer)
    index = index_of(Path(data.root), split, folder, tokenizer, data, task)
    sources = [source for source in index.sources if isinstance(source, Examples)]
    assert index.tokenizer is not None, "examples have texts"
    return ExampleCorpus(
        sources=sources, labels=index.labels, tokenizer=index.tokenizer,
        hash=hashlib.sha256(f"{index.hash} {index.tokenizer.hash}".encode()).hexdigest(),
    )  # fmt: skip
