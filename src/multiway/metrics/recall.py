"""Recall@k of retrieval by vectors, several right answers per query allowed (the Karpathy protocol), and its chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from multiway.errors import DataError, NumericsError

SCORES = 2**24
"""Scores held at once: 64 MB of float32, so that 5,000 pictures against 25,000 captions need no more."""

KS = (1, 5, 10)


def recall(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_owner: np.ndarray,
    candidate_owner: np.ndarray,
    ks: Sequence[int] = KS,
    first: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """Share of queries with a right answer among their k nearest candidates: ``{"r1": ..., "r5": ...}`` in [0, 1].

    queries: float (Q, D); candidates: float (C, D), compared by inner product; query_owner: int (Q,) and
    candidate_owner: int (C,): an answer is right when the owners are equal. ``first``: numbers of candidates, int64 (Q,
    T), that come before all others of a query, ordered by scores of their own (Q, T) alone; None = none do.

    Ties count as what breaking them at random gives on average, so that constant vectors score exactly chance.

    Raises DataError when a query has no right answer, NumericsError when a score is not finite.
    """
    hits = np.zeros(len(ks))
    rows = max(1, SCORES // len(candidates))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        scores = queries[part] @ candidates.T
        if first is not None:
            scores = _raised(scores, first[0][part], first[1][part])
        hits += recall_of_scores(scores, query_owner[part], candidate_owner, ks).sum(0)
    return _named(hits / len(queries), ks)


def nearest(queries: np.ndarray, candidates: np.ndarray, top: int) -> np.ndarray:
    """Numbers of the ``top`` nearest candidates of each query, ascending: int64 (Q, min(top, C)).

    Vectors as in `recall`. Of candidates that are equally near the first ones are taken.
    """
    top = min(top, len(candidates))
    rows = max(1, SCORES // len(candidates))
    found = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ candidates.T
        least = np.partition(scores, -top, axis=1)[:, -top, None]
        nearer, tied = scores > least, scores == least
        free = top - nearer.sum(1, keepdims=True)
        found.append((nearer | (tied & (tied.cumsum(1) <= free))).nonzero()[1].reshape(-1, top))
    return np.concatenate(found)


def _raised(scores: np.ndarray, numbers: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Scores (Q, C) in which the candidates ``numbers`` (Q, T) stand above all others, in the order of their own."""
    if not np.isfinite(own).all():
        raise NumericsError("the scores of pairs are not finite: the model that re-ranks has diverged")
    order = own.argsort(1)
    ascending = np.take_along_axis(own, order, 1)
    place = (np.diff(ascending, axis=1, prepend=ascending[:, :1]) > 0).cumsum(1)  # equal ones share theirs
    raised = scores.astype(np.float64)
    np.put_along_axis(raised, np.take_along_axis(numbers, order, 1), raised.max(1, keepdims=True) + 1 + place, 1)
    return raised


def recall_of_scores(
    scores: np.ndarray, query_owner: np.ndarray, candidate_owner: np.ndarray, ks: Sequence[int] = KS
) -> np.ndarray:
    """Probability that each query finds a right answer among its k best: float64 (Q, len(ks)).

    scores: float (Q, C), higher is nearer; owners, ties and errors as in `recall`.
    """
    if not np.isfinite(scores).all():
        raise NumericsError("retrieval scores are not finite: the vectors hold NaN or infinity; the model has diverged")
    right = query_owner[:, None] == candidate_owner
    if not right.any(1).all():
        alone = query_owner[~right.any(1)][0]
        raise DataError(f"query of owner {alone} has no candidate of the same owner: leave it out or add its answer")
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    tied = scores == best
    better = (scores > best).sum(1)  # none of them is right
    return _drawn((tied & ~right).sum(1), (tied & right).sum(1), np.subtract.outer(np.asarray(ks), better).T)


def chance(query_owner: np.ndarray, candidate_owner: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """The recall of random answers: what `recall` is without information, in [0, 1]."""
    owners, counts = np.unique(candidate_owner, return_counts=True)
    right = counts[np.searchsorted(owners, query_owner)]
    draws = np.broadcast_to(np.asarray(ks), (len(right), len(ks)))
    return _named(_drawn(len(candidate_owner) - right, right, draws).mean(0), ks)


def _drawn(wrong: np.ndarray, right: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Probability of at least one right among ``draws`` (Q, K) draws without return from wrong and right ones (Q,)."""
    missed = np.ones(draws.shape)
    for i in range(int(draws.max(initial=0))):
        left = np.maximum(wrong - i, 0) / np.maximum(wrong + right - i, 1)
        missed *= np.where(draws > i, left[:, None], 1.0)
    return 1.0 - missed


def _named(values: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    return {f"r{k}": round(float(value), 12) for k, value in zip(ks, values, strict=True)}
