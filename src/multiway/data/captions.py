"""Batches that teach a model to write captions: words hidden as if they were still to come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from multiway.data.collate import Samples, Words, basics
from multiway.data.hide import RANDOM, REPLACE
from multiway.errors import ConfigError
from multiway.plan import make_plan
from multiway.types import Batch


def hide_caption(
    ids: np.ndarray, ratio: float, words: Words, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hide ``int(ratio * n + .5)`` of the n tokens of a caption, at least one and never ``<s>``.

    ids: int (n,) with ``<s>`` and ``</s>``, which is hidden as words are: so the model learns where captions end.
    Returns the corrupted ids (80 % of the hidden ones ``<mask>``, 10 % a random id from ``<unk>`` to ``<mask>``, 10 %
    unchanged) and the hidden places, ascending. Source: masked.md 6.3.
    """
    count = min(len(ids) - 1, max(1, int(ratio * len(ids) + 0.5)))
    hidden = np.sort(1 + rng.choice(len(ids) - 1, count, replace=False))
    fate = rng.random(count)
    shown = ids.copy()
    shown[hidden[fate < REPLACE]] = words.mask_id
    random = hidden[(fate >= REPLACE) & (fate < REPLACE + RANDOM)]
    shown[random] = rng.integers(words.first - 1, max(words.stop, words.mask_id + 1), size=len(random))
    return shown, hidden


@dataclass(frozen=True, kw_only=True)
class CaptionCollate:
    """Batches for captioning: the picture sees itself, a word the picture and the words up to itself.

    ``grid``: (rows, columns) of patches; ``ratio``: share of the tokens of a caption that are hidden; ``branches``:
    residual branches that stochastic depth may drop (2 L), 0 = no draws.
    """

    words: Words
    grid: tuple[int, int]
    ratio: float = 0.7
    branches: int = 0

    def __post_init__(self) -> None:
        if self.words.mask_id < 0:
            raise ConfigError("this tokenizer has no <mask>, so no words can be hidden: take another tokenizer")

    def __call__(self, samples: Samples) -> Batch:
        """Draw what is hidden from each pair's generator and lay everything out."""
        pairs = samples["pair"]
        texts = [self.words.framed(sample.text, "pair") for sample in pairs if sample.text is not None]
        assert len(texts) == len(pairs), "a pair has a text"
        drawn = [
            hide_caption(ids, self.ratio, self.words, sample.rng) for ids, sample in zip(texts, pairs, strict=True)
        ]
        lengths = np.array([len(ids) for ids in texts])
        start = np.cumsum(lengths) - lengths
        hidden = np.concatenate([places + before for (_, places), before in zip(drawn, start, strict=True)])
        tokens = [self.grid[0] * self.grid[1] + 1] * len(pairs)
        return {
            "plan": make_plan({"pair": {"image": tokens, "text": lengths}}, causal_text=True),
            **basics({"pair": pairs}, self.branches),
            "text": torch.from_numpy(np.concatenate([shown for shown, _ in drawn])),
            "text_hidden": torch.from_numpy(hidden),
            "text_target": torch.from_numpy(np.concatenate(texts)[hidden]),
        }
