"""Accuracy of classification by scores."""

from __future__ import annotations

import numpy as np

from multiway.errors import NumericsError


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose label has the highest score, in [0, 1]: `topk` of one."""
    return topk(scores, labels, 1)


def topk(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the ``k`` highest scores, in [0, 1].

    scores: float (N, C), higher is likelier; labels: int (N,) in [0, C). Ties count as what breaking them at random
    gives on average, so that constant scores give exactly k / C.

    Raises NumericsError when a score is not finite.
    """
    return float(_hits(scores, labels, k).mean())


def class_top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean of `top1` over the classes that occur, however many rows each has."""
    counts = np.bincount(labels)
    sums = np.bincount(labels, weights=_hits(scores, labels, 1))
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def _hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Probability that each row's label is among its k highest scores: float64 (N,)."""
    if not np.isfinite(scores).all():
        raise NumericsError("class scores are not finite: the model has diverged")
    own = scores[np.arange(len(labels)), labels][:, None]
    return np.clip((k - (scores > own).sum(1)) / (scores == own).sum(1), 0, 1)
