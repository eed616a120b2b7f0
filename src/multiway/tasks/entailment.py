"""Visual entailment: does a picture entail a sentence, contradict it, or neither (SNLI-VE)?"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from multiway.tasks.answering import JOINT, accuracy, figures

NEEDS = JOINT
"""What a model must encode: a picture with a text."""


def evaluate(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """Accuracy of all examples, and of those of each class, in [0, 1].

    Returns ``{"accuracy", "classes": {name: share}, "examples", "floor": {"answer", "accuracy"}}``, the floor being the
    most frequent class. Raises DataError when there is no example.
    """
    own: dict[str, list[str]] = defaultdict(list)
    for name, right in zip(predicted, truth, strict=True):
        own[right].append(name)
    found = figures(predicted, truth, lambda x, y: {"accuracy": accuracy(x, y)})
    return {**found, "classes": {right: names.count(right) / len(names) for right, names in sorted(own.items())}}


def predictions(keys: Sequence[str], predicted: Sequence[str]) -> str:
    """JSON lines ``{"pairID": key, "label": class}``: the names of SNLI-VE, which has no scorer of its own."""
    return "".join(
        json.dumps({"pairID": key, "label": own}, ensure_ascii=False) + "\n"
        for key, own in zip(keys, predicted, strict=True)
    )
