"""Scores of captions: by hand, by the published formulas written out anew, and by the official program if installed."""

from __future__ import annotations

import itertools
import math
from math import exp, log, sqrt

import numpy as np
import pytest

from multiway.errors import DataError
from multiway.metrics.caption import bleu, characters, cider_d, common_length, rouge_l, scores, words


def cut(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man, in a T-shirt; jumps!", "a man in a t-shirt jumps"),
        ("The dog's ball isn't his.", "the dog 's ball is n't his"),
        ("They\u2019ll say they can't: \u201cno\u201d", "they 'll say they ca n't no"),
        ("3,000 people (or so) at 10:30 -- half-time ...", "3,000 people or so at 10:30 half-time"),
        ("black & white, $5", "black & white $ 5"),
        ("'quoted' and the boys' dog", "quoted and the boys dog"),
        ("rock'n'roll at 5 o'clock", "rock'n'roll at 5 o'clock"),
        ("Ein Hund springt \u00fcber den Zaun.", "ein hund springt \u00fcber den zaun"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_words_are_cut_as_english_is(text: str, tokens: str) -> None:
    assert words(text) == tokens.split()


def test_characters_are_all_but_punctuation_and_spaces() -> None:
    assert characters("\u4e00\u53ea\u72d7\uff0c\u5728 \u8349\u5730\u4e0a\u3002A!") == [
        "\u4e00", "\u53ea", "\u72d7", "\u5728", "\u8349", "\u5730", "\u4e0a", "a",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- by hand


def test_bleu_by_hand() -> None:
    """Papineni's example of clipping; a short candidate; the shorter of two references that are equally close."""
    references = [cut("the cat is on the mat", "there is a cat on the mat")]
    assert bleu(cut("the the the the the the the"), references) == pytest.approx((2 / 7, 0, 0, 0))
    assert bleu(cut("a b"), [cut("a b c d")]) == pytest.approx((exp(-1), exp(-1), 0, 0))
    assert bleu(cut("a b c"), [cut("a b c d", "a b")])[0] == pytest.approx(1.0)
    assert bleu(cut("a b c d e"), [cut("a b c d e")]) == pytest.approx((1, 1, 1, 1))
    assert bleu([[]], [cut("a")]) == (0, 0, 0, 0)


def test_bleu_is_of_the_corpus() -> None:
    """Counts and lengths are added up before anything is divided."""
    both = bleu(cut("a b", "x y z w"), [cut("a b"), cut("a b c d e f")])
    assert both[0] == pytest.approx(2 / 6 * exp(1 - 8 / 6))
    assert both[1] == pytest.approx(sqrt(2 / 6 * 1 / 4) * exp(1 - 8 / 6))


def test_rouge_by_hand() -> None:
    assert common_length("abc", "acde") == 2
    assert common_length("banana", "anbaa") == 4
    precision, recall = 2 / 3, 2 / 4
    want = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(cut("a b c"), [cut("a c d e")]) == pytest.approx(want)
    # precision and recall may come from different references
    assert rouge_l(cut("a b"), [cut("a x y z w", "b")]) == pytest.approx(2.44 * 0.5 * 1 / (1 + 1.44 * 0.5))
    assert rouge_l(cut("a", "b"), [cut("a"), cut("c")]) == pytest.approx(0.5)


def test_cider_by_hand() -> None:
    """Two pictures; "a" is in both, so it counts nothing; runs of three and four do not exist."""
    references = [cut("a b"), cut("a c")]
    assert cider_d(cut("a b", "a c"), references) == pytest.approx(5.0)
    # "a b b": unigrams b twice, clipped to once; bigrams (a b) and the unseen (b b); one token longer
    first = 10 * (0.5 + 1 / sqrt(2)) / 4 * exp(-1 / 72)
    assert cider_d(cut("a b b", "a c"), references) == pytest.approx((first + 5) / 2)
    assert cider_d(cut("a c", "a b"), references) == pytest.approx(0.0)
    assert cider_d(cut("a b"), references[:1]) == 0  # every word is in all pictures, when there is one


# ------------------------------------------------------------------------------------------------------ written anew


def corpus(seed: int, pictures: int = 30) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Random texts of a few words, candidates made of pieces of references."""
    rng = np.random.default_rng(seed)

    def text() -> list[str]:
        return [str(w) for w in np.minimum(rng.geometric(0.15, int(rng.integers(1, 14))), 25)]

    references = [[text() for _ in range(int(rng.integers(1, 6)))] for _ in range(pictures)]
    candidates = []
    for own in references:
        first, second = own[0], own[-1]
        candidates.append([*first[: int(rng.integers(1, 9))], *second[int(rng.integers(0, 9)) :], *text()[:2]])
    candidates[0] = []
    return candidates, references


def runs(text: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(text[i:] for i in range(n)), strict=False))


def plain_bleu(candidates: list, references: list) -> list[float]:
    c = sum(map(len, candidates))
    r = 0
    for text, own in zip(candidates, references, strict=True):
        r += sorted((len(o) for o in own), key=lambda n: (abs(n - len(text)), n))[0]
    logs, result = [], []
    for n in range(1, 5):
        right = total = 0
        for text, own in zip(candidates, references, strict=True):
            grams = runs(text, n)
            total += len(grams)
            right += sum(min(grams.count(g), max(runs(o, n).count(g) for o in own)) for g in set(grams))
        logs.append(log(right / total))
        result.append(exp(min(0, 1 - r / c)) * exp(sum(logs) / n))
    return result


def subsequences(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(c) for n in range(len(text) + 1) for c in itertools.combinations(text, n)}


def plain_cider(candidates: list, references: list) -> float:
    """Vectors over all n-grams there are, as the paper writes them."""
    per_picture = []
    for text, own in zip(candidates, references, strict=True):
        of_n = []
        for n in range(1, 5):
            space = sorted({g for t in (text, *own) for g in runs(t, n)})
            inverse = []
            for g in space:
                holding = sum(any(g in runs(o, n) for o in other) for other in references)
                inverse.append(log(len(references) / max(1, holding)))

            def vector(t: list[str], n: int = n, space: list = space, inverse: list = inverse) -> np.ndarray:
                return np.array([runs(t, n).count(g) for g in space]) * np.array(inverse)

            values = []
            for other in own:
                a, b = vector(text), vector(other)
                size = np.linalg.norm(a) * np.linalg.norm(b)
                cosine = (np.minimum(a, b) @ b) / size if size else 0.0
                values.append(cosine * exp(-((len(text) - len(other)) ** 2) / (2 * 6.0**2)))
            of_n.append(10 * sum(values) / len(values))
        per_picture.append(sum(of_n) / 4)
    return sum(per_picture) / len(per_picture)


@pytest.mark.parametrize("seed", range(3))
def test_bleu_and_cider_are_the_published_formulas(seed: int) -> None:
    candidates, references = corpus(seed)
    assert bleu(candidates, references) == pytest.approx(plain_bleu(candidates, references), rel=1e-9)
    found = cider_d(candidates, references)
    assert found == pytest.approx(plain_cider(candidates, references), rel=1e-9) and 0.5 < found < 9


def test_the_longest_common_subsequence_is_the_longest_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = ([str(w) for w in rng.integers(0, 4, int(rng.integers(0, 9)))] for _ in range(2))
        assert common_length(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_scores_of_raw_texts() -> None:
    captions = ["A dog runs.", "two men play"]
    references = [["a dog runs!", "the dog is running"], ["Two men play", "men playing"]]
    found = scores(captions, references)
    assert set(found) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider_d"}
    assert found["bleu1"] == found["bleu3"] == found["rouge_l"] == 1.0 and found["bleu4"] == 0.0
    assert scores(["\u72d7\u8dd1\u3002"], [["\u72d7\u8dd1"]], "characters")["bleu2"] == 1.0
    assert scores(["\u72d7\u8dd1\u3002"], [["\u72d7 \u8dd1"]], "words")["bleu1"] == 0.0


@pytest.mark.parametrize(("captions", "references"), [(["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []]), ([], [])])
def test_what_has_no_reference_is_refused(captions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(DataError, match="expected one caption for each picture, and at least one reference"):
        scores(captions, references)


@pytest.mark.parity
def test_figures_are_those_of_the_official_program() -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = corpus(7)
    candidates[0] = ["1", "2", "3", "4"]
    truth = {i: [" ".join(text) for text in own] for i, own in enumerate(references)}
    given = {i: [" ".join(text)] for i, text in enumerate(candidates)}
    assert bleu(candidates, references) == pytest.approx(Bleu(4).compute_score(truth, given, verbose=0)[0], rel=1e-6)
    assert rouge_l(candidates, references) == pytest.approx(Rouge().compute_score(truth, given)[0], rel=1e-9)
    assert cider_d(candidates, references) == pytest.approx(Cider().compute_score(truth, given)[0], rel=1e-9)
    assert math.isfinite(cider_d(candidates, references))
