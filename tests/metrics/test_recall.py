"""Recall against an independent count, ties, and the size it must bear."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from multiway.errors import DataError, NumericsError
from multiway.metrics import recall as module
from multiway.metrics.recall import chance, nearest, recall, recall_of_scores


def unit(rng, n, d):
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sorted_recall(scores, query_owner, candidate_owner, k):
    """The plain definition, by sorting; right when no scores are equal."""
    found = [query_owner[i] in candidate_owner[np.argsort(-row)[:k]] for i, row in enumerate(scores)]
    return float(np.mean(found))


@pytest.mark.parametrize("scores_at_once", [2**24, 100])
def test_equals_sorting_both_ways_with_several_captions(monkeypatch, scores_at_once):
    monkeypatch.setattr(module, "SCORES", scores_at_once)
    rng = np.random.default_rng(0)
    image, text = unit(rng, 40, 8), unit(rng, 130, 8)
    owner = np.concatenate([np.arange(40), rng.integers(0, 40, 90)])
    text += 0.5 * image[owner]
    own = np.arange(40)
    scores = image.astype(np.float64) @ text.T.astype(np.float64)
    forth, back = recall(image, text, own, owner), recall(text, image, owner, own)
    for k in (1, 5, 10):
        assert forth[f"r{k}"] == pytest.approx(sorted_recall(scores, own, owner, k), abs=1e-12)
        assert back[f"r{k}"] == pytest.approx(sorted_recall(scores.T, owner, own, k), abs=1e-12)
    assert 0.1 < forth["r1"] < forth["r5"] < forth["r10"] < 1


def test_a_hand_made_case():
    scores = np.array([[0.9, 0.5, 0.1], [0.8, 0.2, 0.7], [0.3, 0.6, 0.6]])
    hits = recall_of_scores(scores, np.arange(3), np.arange(3), ks=(1, 2, 3))
    # first: at once; second: last of three; third: ties with the wrong one for the first place
    assert hits.tolist() == [[1, 1, 1], [0, 0, 1], [0.5, 1, 1]]


def test_constant_vectors_score_exactly_chance():
    image, text = np.ones((20, 4), np.float32), np.ones((60, 4), np.float32)
    own, owner = np.arange(20), np.repeat(np.arange(20), 3)
    assert recall(image, text, own, owner) == pytest.approx(chance(own, owner))
    assert recall(text, image, owner, own) == pytest.approx(chance(owner, own))


def test_constant_vectors_whose_products_are_rounded_stay_near_chance():
    vector = unit(np.random.default_rng(1), 1, 333)
    image, text = np.repeat(vector, 501, 0), np.repeat(vector, 501, 0)
    assert recall(image, text, np.arange(501), np.arange(501))["r10"] < 0.05


def test_ties_are_what_random_breaking_gives_on_average():
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 4, (30, 25)).astype(np.float32)
    own, owner = np.arange(30) % 9, np.concatenate([np.arange(9), rng.integers(0, 9, 16)])
    exact = recall_of_scores(scores, own, owner).mean(0)
    trials = [
        [sorted_recall(scores + 1e-3 * rng.random(scores.shape), own, owner, k) for k in (1, 5, 10)] for _ in range(400)
    ]
    assert np.mean(trials, 0) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_chance_is_the_hypergeometric_one(k):
    owner = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 5, 5, 5])
    by_hand = np.mean([1 - comb(30 - n, k) / comb(30, k) for n in [1, 2, 3, 4, 5, 5, 5, 5]])
    assert chance(np.arange(8), owner)[f"r{k}"] == pytest.approx(by_hand)
    assert chance(owner, np.arange(8))[f"r{k}"] == pytest.approx(min(1, k / 8))


def test_small_sets_are_found_whole():
    assert recall(np.eye(3), -np.eye(3), np.arange(3), np.arange(3)) == {"r1": 0.0, "r5": 1.0, "r10": 1.0}


def test_nan_and_orphans_are_refused():
    image = np.eye(3, dtype=np.float32)
    with pytest.raises(DataError, match="owner 2 has no candidate"):
        recall(image, image, np.arange(3), np.array([0, 1, 1]))
    image[1, 1] = np.nan
    with pytest.raises(NumericsError, match="NaN"):
        recall(image, image, np.arange(3), np.arange(3))


def test_five_thousand_pictures_and_their_captions_fit_in_memory(monkeypatch):
    largest = 0

    def watched(scores, *rest):
        nonlocal largest
        largest = max(largest, scores.nbytes)
        return recall_of_scores(scores, *rest)

    monkeypatch.setattr(module, "recall_of_scores", watched)
    rng = np.random.default_rng(3)
    image = unit(rng, 5000, 4)
    owner = np.repeat(np.arange(5000), 5)
    found = recall(image, image[owner], np.arange(5000), owner, ks=(1,))
    assert found["r1"] > 0.99
    assert largest <= 4 * module.SCORES


@pytest.mark.parametrize("scores_at_once", [2**24, 100])
def test_the_nearest_are_those_of_sorting(monkeypatch, scores_at_once):
    monkeypatch.setattr(module, "SCORES", scores_at_once)
    rng = np.random.default_rng(0)
    queries, candidates = unit(rng, 30, 8), unit(rng, 50, 8)
    wanted = np.sort(np.argsort(-(queries @ candidates.T), axis=1)[:, :7], axis=1)
    assert (nearest(queries, candidates, 7) == wanted).all()
    assert (nearest(queries, candidates, 80) == np.arange(50)).all()


def test_of_equally_near_ones_the_first_are_taken():
    candidates = np.array([[0.5], [1.0], [0.5], [0.5], [0.2]], np.float32)
    assert nearest(np.ones((2, 1), np.float32), candidates, 3).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_the_first_are_ordered_by_their_own_scores_and_stand_above_the_rest():
    queries, candidates = np.ones((1, 1), np.float32), np.array([[0.9], [0.8], [0.7], [0.6]], np.float32)
    first = np.array([[0, 1, 2]]), np.array([[-5.0, 3e9, -5.0]])

    def found(right):
        return list(recall(queries, candidates, np.zeros(1), np.arange(4) != right, (1, 2, 3, 4), first).values())

    assert found(1) == [1, 1, 1, 1]
    assert found(0) == found(2) == [0, 0.5, 1, 1]  # they tie
    assert found(3) == [0, 0, 0, 1]
    with pytest.raises(NumericsError, match="re-ranks"):
        recall(queries, candidates, np.zeros(1), np.zeros(4), first=(first[0], np.array([[1.0, np.nan, 2.0]])))
