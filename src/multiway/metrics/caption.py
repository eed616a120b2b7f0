"""Captions against references, as the COCO caption evaluation measures them: BLEU, ROUGE-L, CIDEr-D.

All take tokens, which `words` and `characters` make. Where we differ: the official evaluation cuts texts with
Stanford's PTB tokenizer, a Java program. `words` lower-cases, splits off what English contracts (``do n't``, ``dog
's``) and drops punctuation as it does, but abbreviations with full stops come apart (``u s``, there ``u.s.``),
``cannot`` and ``gonna`` stay whole, and slashes and brackets of every kind are dropped.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from multiway.errors import DataError

Text = Sequence[str]
"""One text, token by token."""
References = Sequence[Sequence[Text]]
"""Of each picture, at least one."""

ORDER = 4
"""Longest n-grams compared."""
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0

_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_TOKEN = re.compile(r"n't(?!\w)|'(?:s|m|d|re|ve|ll)(?!\w)|\d+(?:[.,:]\d+)+|\w+(?:[-'&]\w+)*|[$&%#@+=*]")


def words(text: str) -> list[str]:
    """A text as English words, in lower case and without punctuation; see above."""
    return _TOKEN.findall(_CONTRACTION.sub(r" \1", text.lower().replace("\u2019", "'")))


def characters(text: str) -> list[str]:
    """A text as characters, without white space, punctuation and symbols: for Chinese."""
    return [c for c in text.lower() if not c.isspace() and unicodedata.category(c)[0] not in "PS"]


Unit = Literal["words", "characters"]
"""What texts are cut into."""


def scores(captions: Sequence[str], references: Sequence[Sequence[str]], unit: Unit = "words") -> dict[str, float]:
    """All figures of a caption for each picture: ``{"bleu1", ..., "bleu4", "rouge_l", "cider_d"}``.

    Raises DataError unless there are as many captions as pictures, and a reference for each.
    """
    if len(captions) != len(references) or not all(references) or not captions:
        empty = sum(not own for own in references)
        raise DataError(
            f"{len(captions)} captions for {len(references)} pictures, {empty} of them without reference: expected one "
            "caption for each picture, and at least one reference"
        )
    cut = characters if unit == "characters" else words
    candidates, targets = [cut(text) for text in captions], [[cut(text) for text in own] for own in references]
    found = {f"bleu{n}": value for n, value in enumerate(bleu(candidates, targets), 1)}
    return {**found, "rouge_l": rouge_l(candidates, targets), "cider_d": cider_d(candidates, targets)}


def bleu(candidates: Sequence[Text], references: References) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of a corpus, in [0, 1], each text against the length of the reference closest to it.

    Of references equally close the shorter counts. Source: Papineni et al. 2002; COCO's choice of length. COCO's adds
    1e-15 to every count, so that where no n-gram is right it says about 1e-4 instead of 0.
    """
    right, made = np.zeros(ORDER), np.zeros(ORDER)
    length = reference_length = 0
    for text, own in zip(candidates, references, strict=True):
        length += len(text)
        reference_length += min((abs(len(other) - len(text)), len(other)) for other in own)[1]
        allowed: Counter[Text] = Counter()
        for other in own:
            allowed |= ngrams(other)
        for gram, count in (ngrams(text) & allowed).items():
            right[len(gram) - 1] += count
        made += np.maximum(len(text) - np.arange(ORDER), 0)
    precision = right / np.maximum(made, 1)
    brevity = math.exp(min(0.0, 1 - reference_length / length)) if length else 0.0
    return tuple(brevity * float(np.prod(precision[:n])) ** (1 / n) for n in range(1, ORDER + 1))


def rouge_l(candidates: Sequence[Text], references: References) -> float:
    """Mean over pictures of ROUGE-L, in [0, 1]: F of the longest common subsequence with recall weighted 1.2.

    Precision and recall are each the best over the references. Source: Lin 2004, COCO's variant.
    """
    total = 0.0
    for text, own in zip(candidates, references, strict=True):
        common = [common_length(text, other) for other in own]
        precision = max(common) / max(1, len(text))
        recall = max(n / max(1, len(other)) for n, other in zip(common, own, strict=True))
        if precision and recall:
            total += (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return total / len(candidates)


def cider_d(candidates: Sequence[Text], references: References) -> float:
    """Mean over pictures of CIDEr-D, in [0, 10]: likeness of n-grams, rare ones counting more.

    How rare an n-gram is, is told by the number of pictures with it among their references; so of one picture alone the
    score is 0. Source: Vedantam et al. 2015, with clipping, sigma 6 and n of 1 to 4.
    """
    counted = [[ngrams(other) for other in own] for own in references]
    pictures = Counter(gram for own in counted for gram in set().union(*own))
    rarity = {gram: math.log(len(references) / count) for gram, count in pictures.items()}
    unseen = math.log(len(references))
    total = 0.0
    for text, own, counts in zip(candidates, references, counted, strict=True):
        candidate = _weighted(ngrams(text), rarity, unseen)
        for other, grams in zip(own, counts, strict=True):
            near = math.exp(-((len(text) - len(other)) ** 2) / (2 * CIDER_SIGMA**2))
            total += near * _likeness(candidate, _weighted(grams, rarity, unseen)) / len(own)
    return 10 * total / len(candidates)


def ngrams(text: Text) -> Counter[Text]:
    """How often each run of 1 to ORDER tokens occurs."""
    text = tuple(text)
    return Counter(text[i : i + n] for n in range(1, ORDER + 1) for i in range(len(text) - n + 1))


def common_length(a: Text, b: Text) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for x in a:
        now = [0]
        for j, y in enumerate(b):
            now.append(before[j] + 1 if x == y else max(before[j + 1], now[j]))
        before = now
    return before[-1]


def _weighted(counts: Counter[Text], rarity: Mapping[Text, float], unseen: float) -> dict[Text, float]:
    return {gram: count * rarity.get(gram, unseen) for gram, count in counts.items()}


def _likeness(candidate: Mapping[Text, float], reference: Mapping[Text, float]) -> float:
    """Clipped cosine of the n-grams of each length, their mean."""
    product, norms = np.zeros(ORDER), np.zeros((2, ORDER))
    for gram, weight in candidate.items():
        other = reference.get(gram, 0.0)
        product[len(gram) - 1] += min(weight, other) * other
        norms[0, len(gram) - 1] += weight**2
    for gram, weight in reference.items():
        norms[1, len(gram) - 1] += weight**2
    size = np.sqrt(norms.prod(0))
    return float(np.divide(product, size, out=np.zeros(ORDER), where=size > 0).mean())
