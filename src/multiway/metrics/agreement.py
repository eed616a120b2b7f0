"""How predictions agree with the truth, as GLUE measures it: Matthews correlation, F1, Pearson, Spearman.

Where a figure is not defined, because one side never changes, it is 0: what guessing gives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from multiway.errors import NumericsError


def matthews(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Matthews correlation of classes (N,), numbers or names, in [-1, 1]; 0 when either side has one class only.

    Source: Matthews 1975; for more than two classes Gorodkin 2004, which of two is the same.
    """
    classes, both = np.unique(np.stack([np.asarray(predicted), np.asarray(truth)]), return_inverse=True)
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, tuple(both.reshape(2, -1)), 1)
    said, was = table.sum(1), table.sum(0)
    shared = table.sum() * np.trace(table) - said @ was
    spread = (said.sum() ** 2 - said @ said) * (was.sum() ** 2 - was @ was)
    return float(shared / np.sqrt(spread)) if spread > 0 else 0.0


def f1(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Harmonic mean of precision and recall of what is True, bool (N,), in [0, 1]; 0 when no True one is found."""
    said, was = np.asarray(predicted, bool), np.asarray(truth, bool)
    found = (said & was).sum()
    return float(2 * found / (said.sum() + was.sum())) if found else 0.0


def pearson(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Linear correlation of numbers (N,), in [-1, 1]; 0 when either side is constant.

    Raises NumericsError when a number is not finite.
    """
    both = np.stack([np.asarray(predicted, np.float64), np.asarray(truth, np.float64)])
    if not np.isfinite(both).all():
        raise NumericsError("numbers to correlate are not finite: the model has diverged")
    if both.size == 0 or (both.min(1) == both.max(1)).any():
        return 0.0
    both = both - both.mean(1, keepdims=True)
    both /= np.abs(both).max(1, keepdims=True)  # so that squares of tiny numbers are not lost
    x, y = both
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Correlation of ranks of numbers (N,), equal ones sharing the mean of their ranks; otherwise as `pearson`."""
    x, y = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    return pearson(*(_ranks(side) if np.isfinite(side).all() else side for side in (x, y)))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
