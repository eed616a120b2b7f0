"""Visual reasoning: is a sentence true of two pictures (NLVR2), or of one (NLVR1)?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from multiway.tasks.answering import JOINT, accuracy, figures

NEEDS = JOINT
"""What a model must encode: a picture with a text."""

_KEY = re.compile(r"(\w+)-(\d+)-(\d+)-(\d+)(\.png)?")


def sentence(key: str) -> str | None:
    """The part of an official key that says which sentence an example is about; None for any other key.

    NLVR2, ``split-set-pair-sentence``: all but the pair. NLVR1, ``split-sentence-item-permutation.png``: split and
    sentence. Source: the official scorers of lil-lab/nlvr.
    """
    if (found := _KEY.fullmatch(key)) is None:
        return None
    split, first, _, last, picture = found.groups()
    return f"{split}-{first}" if picture else f"{split}-{first}-{last}"


def evaluate(predicted: Sequence[str], truth: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Accuracy, and consistency: the share of sentences all of whose examples are right; both in [0, 1].

    ``predicted``, ``truth``: ``false`` or ``true`` in any case; ``keys``: the official keys of the examples; of others
    no consistency is told. Returns ``{"accuracy", "consistency", "examples", "floor": {"answer", "accuracy",
    "consistency"}}``, the floor being one answer for all. Raises DataError when there is no example.
    """
    sentences = [sentence(key) for key in keys]

    def measure(own: Sequence[str], right: Sequence[str]) -> dict[str, float]:
        found = {"accuracy": accuracy(own, right)}
        if None not in sentences:
            wrong = {about for about, x, y in zip(sentences, own, right, strict=True) if x != y}
            found["consistency"] = 1 - len(wrong) / len(set(sentences))
        return found

    return figures([own.lower() for own in predicted], [own.lower() for own in truth], measure)


def predictions(keys: Sequence[str], predicted: Sequence[str]) -> str:
    """The file that the official scorer reads: lines ``key,True`` for NLVR2, ``key.png,true`` for NLVR1."""
    return "".join(
        f"{key},{own.lower() if key.endswith('.png') else own.capitalize()}\n"
        for key, own in zip(keys, predicted, strict=True)
    )
