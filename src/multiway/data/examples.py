"""Batches of questions: what is asked about no, one or two pictures, and what people answered.

An example is a text, or two, with as many pictures as its task has. Two texts become one, and an example with two
pictures becomes two pairs of one picture and the text, which the model's head puts together again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from multiway.data.collate import Words
from multiway.data.image import Decoder, View
from multiway.data.indexed import Examples
from multiway.data.order import generator
from multiway.errors import ConfigError, DataError
from multiway.plan import make_plan
from multiway.types import Batch

__all__ = ["ExampleCollate", "ExampleSource", "Examples", "LoadExamples", "Question", "join"]

TARGETS = {"label": np.int64, "score": np.float32, "value": np.float32}
"""What the right answer may be in a batch, and of which type."""


class ExampleSource(Protocol):
    """Examples of one source, as `Examples` of an index are."""

    def __len__(self) -> int: ...

    @property
    def blocks(self) -> Sequence[int] | None:
        """None: examples are in one piece."""
        ...

    def key(self, i: int, /) -> str:
        """Official name of an example."""
        ...

    def pictures(self, i: int, /) -> int:
        """Number of its pictures."""
        ...

    def images(self, i: int, /, px: int | None = None, decoder: Decoder = "pillow") -> list[Tensor]:
        """Its pictures, uint8 (3, H, W) each."""
        ...

    def texts(self, i: int, /) -> tuple[np.ndarray, ...]:
        """Ids of its texts, int (n,) each, without specials."""
        ...

    def answers(self, i: int, /) -> tuple[int, ...]:
        """Numbers of its answers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """One example as the loader hands it over.

    ``images``: uint8 (3, H, W) each; ``text``: int (N,) ids of its text or its joined texts, without the specials
    around them; ``answers``: numbers of what people answered, () = nobody did; ``record``: its number in its source;
    ``rng``: its own generator, a function of (seed, epoch, record).
    """

    images: tuple[Tensor, ...]
    text: np.ndarray
    answers: tuple[int, ...]
    record: int
    rng: np.random.Generator


def join(texts: Sequence[np.ndarray], words: Words) -> np.ndarray:
    """One text of one or two, int (N,), that with its specials has at most ``words.longest`` ids.

    Between two lie ``</s> </s>`` where ``<s>`` is 0 (XLM-R's ids, BEiT-3's and ours), ``[SEP]`` where there are other
    ids to hide words (BERT's), and nothing elsewhere (CLIP, SigLIP). Of two that are too long together, the longer one
    loses its end, until both are equally long. Raises ConfigError when ``longest`` leaves no id of either.
    """
    first, *others = texts
    between = [words.eos] * (0 if words.mask_id < 0 else 2 if words.bos == 0 else 1) if others else []
    room = words.longest - (words.bos >= 0) - 1 - len(between)
    if room < len(texts):
        raise ConfigError(f"texts of at most {words.longest} ids have no room for {len(texts)}: raise data.text_tokens")
    if not others:
        return first[:room]
    second = others[0]
    half = room // 2
    if len(first) + len(second) > room:
        first = first[: max(room - half, room - len(second))]
        second = second[: room - len(first)]
    return np.concatenate([first, np.array(between, first.dtype), second])


@dataclass(frozen=True, kw_only=True)
class LoadExamples:
    """``load(kind, source, record, epoch)``: the question, everything random in it drawn from (seed, epoch, record).

    ``view``: how pictures are shown, None = examples have none; ``words``: what stands between two texts, and how long
    they may be; ``decoder``: who decodes plain JPEGs.
    """

    sources: Sequence[ExampleSource]
    view: View | None
    seed: int
    words: Words
    decoder: Decoder = "pillow"

    def __call__(self, kind: str, source: int, record: int, epoch: int) -> Question:
        """Read, draw a view of every picture, join the texts."""
        rng = generator(self.seed, kind, source, epoch, record)
        origin = self.sources[source]
        images: tuple[Tensor, ...] = ()
        if self.view is not None:
            images = tuple(self.view(x, rng) for x in origin.images(record, self.view.source_px, self.decoder))
        text = join(origin.texts(record), self.words)
        return Question(images=images, text=text, answers=origin.answers(record), record=record, rng=rng)


def _unlabelled(question: Question) -> Mapping[str, Any]:
    """No target."""
    return {}


@dataclass(frozen=True, kw_only=True)
class ExampleCollate:
    """Batches of questions: kind ``pair`` with pictures, picture by picture and question by question, else ``text``.

    ``grid``: (rows, columns) of patches, None without pictures; ``pictures``: of every question; ``branches``: residual
    branches that stochastic depth may drop (2 L), 0 = no draws; ``causal``: whether tokens of a text see none behind
    them (CLIP); ``leading``: tokens in front of the patches of a picture; ``targets``: the right answer of a question
    by key of the batch, ``label`` (its number), ``score`` (C,) or ``value``; {} = it is not known.
    """

    words: Words
    grid: tuple[int, int] | None = None
    pictures: int = 0
    branches: int = 0
    causal: bool = False
    leading: int = 1
    targets: Callable[[Question], Mapping[str, Any]] = _unlabelled

    def __call__(self, samples: Mapping[str, Sequence[Question]]) -> Batch:
        """Lay out the questions, each as often as it has pictures.

        Raises ConfigError for another number of pictures, DataError when only some of the questions have an answer.
        """
        questions = samples["example"]
        times = max(1, self.pictures)
        texts = [x for q in questions for x in [self.words.framed(q.text, "pair")] * times]
        lengths = {"text": [len(text) for text in texts]}
        batch: Batch = {"sample": torch.tensor([q.record for q in questions]).repeat_interleave(times)}
        if self.pictures:
            batch["image"] = torch.stack([x for q in questions for x in self._images(q)]).contiguous()
            lengths = {"image": [self._tokens] * len(texts)} | lengths
        kind = "pair" if self.pictures else "text"
        batch["plan"] = make_plan({kind: lengths}, causal_text=self.causal)
        batch["text"] = torch.from_numpy(np.concatenate(texts))
        if self.branches:
            draws = [q.rng.random((self.branches, times), dtype=np.float32) for q in questions]
            batch["drop_path"] = torch.from_numpy(np.concatenate(draws, axis=1))
        return batch | _stacked([self.targets(q) for q in questions])

    @property
    def _tokens(self) -> int:
        """Tokens of one picture."""
        assert self.grid is not None, "pictures have a grid"
        return self.leading + self.grid[0] * self.grid[1]

    def _images(self, question: Question) -> tuple[Tensor, ...]:
        if len(question.images) != self.pictures:
            raise ConfigError(
                f"example {question.record} has {len(question.images)} pictures, but the model reads {self.pictures} "
                "of each: take other data, or set model.pictures"
            )
        return question.images


def _stacked(targets: Sequence[Mapping[str, Any]]) -> Batch:
    """Targets of all questions by key; nothing when none has one."""
    known = [target for target in targets if target]
    if not known:
        return {}
    if len(known) < len(targets):
        raise DataError(
            f"{len(targets) - len(known)} of {len(targets)} questions have no answer that can be learnt, expected one "
            "of each: leave them out of the data"
        )
    return {
        key: torch.from_numpy(np.stack([np.asarray(target[key], TARGETS[key]) for target in known])) for key in known[0]
    }
