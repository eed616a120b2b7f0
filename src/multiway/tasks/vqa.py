"""Visual question answering: a question about a picture, answered from a vocabulary of frequent answers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from multiway.data.examples import Question
from multiway.errors import DataError
from multiway.metrics.vqa import accuracy, answer_type, majority, normalise, score
from multiway.tasks.answering import JOINT, most_frequent

NEEDS = JOINT
"""What a model must encode: a picture with a text."""

LEAST = 9
"""Questions that an answer must be the most frequent one of to enter the vocabulary (masked.md 6.3)."""


def vocabulary(answers: Iterable[Sequence[str]], least: int = LEAST) -> list[str]:
    """Answers to choose from, in normal form, in the order in which they first are a question's most frequent one.

    ``answers``: of every training question what people answered, none for one without; ``least``: of how many questions
    an answer must be the most frequent one. Raises DataError when none is. Source: masked.md 6.3.
    """
    counts = Counter(majority(own) for own in answers if own)
    found = [answer for answer, count in counts.items() if count >= least]
    if not found:
        raise DataError(
            f"no answer is the most frequent one of {least} questions (there are {counts.total()} with answers): take "
            "more questions, or ask for fewer"
        )
    return found


class ScoreTarget:
    """How right every answer of a vocabulary is to a question: ``{"score": float32 (C,)}``, ``{}`` without answers.

    ``labels``: names of the numbers that questions are answered with, as people wrote them; ``answers``: the
    vocabulary. Of ten people none, one, two, three, or more who say it make 0, .3, .6, .9, 1, as the accuracy counts
    them. Source: masked.md 6.3. Where we differ: the released code looks answers up as they were written, here in
    normal form; it leaves out questions none of whose answers is known, here all their scores are 0.
    """

    def __init__(self, labels: Sequence[str], answers: Sequence[str]) -> None:
        place = {answer: i for i, answer in enumerate(answers)}
        self.places = [place.get(normalise(name)) for name in labels]
        self.size = len(answers)

    def __call__(self, example: Question) -> dict[str, np.ndarray]:
        """Of one question."""
        if not example.answers:
            return {}
        found = np.zeros(self.size, np.float32)
        for place, count in Counter(self.places[answer] for answer in example.answers).items():
            if place is not None:
                found[place] = score(count, len(example.answers))
        return {"score": found}


def evaluate(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Official accuracy of an answer to each question, in [0, 1], all together and by the type of its answers.

    ``answers``: of each question what people answered, at least one. Returns ``{"accuracy", "types": {"yes/no",
    "number", "other"} as far as they occur, "examples", "floor": {"answer", "accuracy"}}``; the floor always gives the
    answer that is most often a question's most frequent one. Raises DataError when there is no question.
    """
    constant = most_frequent([majority(own) for own in answers])
    by_type: dict[str, list[float]] = defaultdict(list)
    for own, people in zip(predicted, answers, strict=True):
        by_type[answer_type(people)].append(accuracy(own, people))
    return {
        "accuracy": float(np.mean(sum(by_type.values(), []))),
        "types": {name: float(np.mean(found)) for name, found in sorted(by_type.items())},
        "examples": len(answers),
        "floor": {"answer": constant, "accuracy": float(np.mean([accuracy(constant, own) for own in answers]))},
    }


def predictions(keys: Sequence[str], predicted: Sequence[str]) -> str:
    """The file that the official scorer reads: JSON ``[{"question_id": int, "answer": str}, ...]``.

    A key that is no number stays text.
    """
    return json.dumps(
        [
            {"question_id": int(key) if key.isdecimal() else key, "answer": answer}
            for key, answer in zip(keys, predicted, strict=True)
        ],
        ensure_ascii=False,
    )
