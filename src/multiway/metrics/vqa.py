"""Visual question answering: an answer against those of ten people, as the official evaluation of VQA counts it.

An answer is right to one third for everybody who gave it, up to three; so that people are measured alike, one of them
is left out, each in turn, and the mean is taken. Answers are compared in a normal form (`normalise`), but where all ten
people wrote the very same, an answer has to be what they wrote: so does the official evaluation.

Where we add: of questions with fewer than four answers, all of the others have to agree for a full point, and one
answer alone is compared in its normal form; so that of sets with one answer each the mean is plain accuracy, and of
sets with ten it is the official figure. Source: Antol et al. 2015 (arXiv 1505.00468); GT-Vision-Lab/VQA, its
evaluation; the version of 2016 still differs where all ten are the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

AGREE = 3
"""People who have to say the same for a full point."""

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(COUNTED)}
CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "ma'am o'clock 'twas y'all 'ow's'at",
}
"""What may follow a word, and the words: of each, a form that lacks one of its apostrophes is given it back."""

_BETWEEN_DIGITS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def _lacking() -> Iterator[tuple[str, str]]:
    """Contractions without one of their apostrophes, and whole."""
    for ending, words in CONTRACTED.items():
        for whole in (word + ending for word in words.split()):
            for mark in re.finditer("'", whole):
                yield whole[: mark.start()] + whole[mark.end() :], whole


CONTRACTIONS = {**dict(_lacking()), "somebody'd": "somebodyd"}  # the last one as the official table has it


@lru_cache(2**16)  # the same answers are given again and again
def normalise(answer: str) -> str:
    """Lower case, number words as digits, no articles, no punctuation but colons and apostrophes, which are restored.

    A sign becomes a space; where it stands beside one anywhere in the answer, or a comma separates digits, it is
    dropped. Full stops are dropped unless a digit follows.
    """
    text = answer = " ".join(answer.split())
    joined = _BETWEEN_DIGITS.search(answer) is not None
    for sign in SIGNS:
        text = text.replace(sign, "" if joined or f"{sign} " in answer or f" {sign}" in answer else " ")
    words = [NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def score(right: int, answers: int) -> float:
    """How right an answer is that ``right`` of so many people gave, in [0, 1]: of ten 0, .3, .6, .9, 1, 1, ..."""
    needed = min(AGREE, answers - 1)
    if not needed:
        return float(right)
    own, other = min(1.0, (right - 1) / needed), min(1.0, right / needed)  # one who gave it is left out, or another
    return (right * own + (answers - right) * other) / answers


def accuracy(predicted: str, answers: Sequence[str]) -> float:
    """How right an answer to one question is, in [0, 1]; ``answers``: what people answered, at least one."""
    if len(answers) == 1 or len({answer.strip() for answer in answers}) > 1:
        predicted, answers = normalise(predicted), [normalise(answer) for answer in answers]
    return score([answer.strip() for answer in answers].count(predicted.strip()), len(answers))


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer to a question in normal form; of several the one that came first."""
    return Counter(map(normalise, answers)).most_common(1)[0][0]


def answer_type(answers: Sequence[str]) -> str:
    """``yes/no``, ``number`` or ``other``: what the most frequent answer is; VQA's own annotation says nearly the same.

    ``number``: digits, perhaps with a decimal point.
    """
    most = majority(answers)
    return "yes/no" if most in ("yes", "no") else "number" if re.fullmatch(r"\d+(\.\d+)?", most) else "other"
