"""Accuracy of classification by scores."""

from __future__ import annotations

import numpy as np

from multiway.errors import NumericsError


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose label has the highest score, in [0, 1].

    scores: float (N, C), higher is likelier; labels: int (N,) in [0, C). Ties count as what breaking them at random
    gives on average, so that constant scores give exactly 1 / C.

    Raises NumericsError when a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise NumericsError("class scores are not finite: the model has diverged")
    tied = scores == scores.max(1, keepdims=True)
    return float((tied[np.arange(len(labels)), labels] / tied.sum(1)).mean())


def topk(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the ``k`` highest scores, in [0, 1]; ties count against it.

    Raises NumericsError when a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise NumericsError("class scores are not finite: the model has diverged")
    own = scores[np.arange(len(labels)), labels][:, None]
    return float(((scores >= own).sum(1) <= k).mean())
