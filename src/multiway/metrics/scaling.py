"""Laws of scale: a power law through losses, the best loss so far, and rank correlation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 4
"""Points a fit of three numbers needs at least, so that something is left to judge it by."""

EXPONENTS = np.geomspace(0.01, 3.0, 60)
"""That are tried first."""
REFINEMENTS, FINER = 5, 11
"""How often exponents around the best are tried, and how many."""
ROUNDS = 12
"""Of reweighting, by which large residuals count less."""
HUBER, TYPICAL = 1.345, 1.4826
"""Standard deviations beyond which a residual is large; standard deviation over median absolute one, if normal."""

RESAMPLED = 200
INTERVAL = (5.0, 95.0)
"""Percentiles between which 90 % of the resampled fits lie."""


@dataclass(frozen=True)
class PowerLaw:
    """``loss = a x^-b + c``; ``resampled``: (R, 3), a, b and c of fits to resampled residuals."""

    a: float
    b: float
    c: float
    resampled: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The loss at x (N,)."""
        return self.a * x**-self.b + self.c

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where 90 % of the resampled fits are at x (N,): lowest and highest."""
        a, b, c = (self.resampled[:, [i]] for i in range(3))
        low, high = np.percentile(a * x**-b + c, INTERVAL, axis=0)
        return low, high

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Where 90 % of the resampled a, b and c are."""
        low, high = np.percentile(self.resampled, INTERVAL, axis=0).tolist()
        return dict(zip("abc", zip(low, high, strict=True), strict=True))

    def figures(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"a": self.a, "b": self.b, "c": self.c, "intervals": self.intervals()}


def fit_power_law(x: np.ndarray, loss: np.ndarray, rng: np.random.Generator) -> PowerLaw:
    """Fit ``a x^-b + c`` with a >= 0, c >= 0 and b in [0.01, 3], robustly (Huber): x and loss (N,), positive.

    For every exponent the best a and c follow in closed form, so that the search is over one number. ``rng``: resamples
    residuals, enlarged by sqrt(N / (N - 3)), for the error bars. Raises ValueError for fewer than FEWEST different x.
    """
    if len(np.unique(x)) < FEWEST:
        raise ValueError(f"a power law of three numbers needs at least {FEWEST} different x, got {len(np.unique(x))}")
    centre = float(np.exp(np.log(x).mean()))
    a, b, c = _fit(x / centre, loss[None])[0]
    fitted = a * (x / centre) ** -b + c
    residual = (loss - fitted) * np.sqrt(len(x) / (len(x) - 3))
    drawn = fitted + rng.choice(residual - residual.mean(), (RESAMPLED, len(x)))
    resampled = _fit(x / centre, np.maximum(drawn, 0.0))
    resampled[:, 0] *= centre ** resampled[:, 1]
    return PowerLaw(float(a * centre**b), float(b), float(c), resampled)


def _fit(x: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """a, b and c of every row of losses (R, N): (R, 3). A grid of exponents, then finer ones around the best."""
    exponents = np.broadcast_to(EXPONENTS, (len(losses), len(EXPONENTS)))
    scale = 1e-6 * losses.max(1)[:, None, None]  # so small that absolute residuals are what is minimised
    _, _, error = _solve(x, losses, exponents, scale)
    best = np.abs(error).sum(2).argmin(1)[:, None, None]
    residual = np.sort(np.abs(np.take_along_axis(error, best, 1)), axis=2)[:, :, 3:]  # three numbers fit three points
    scale = np.maximum(HUBER * TYPICAL * np.median(residual, axis=2, keepdims=True), scale)
    for _ in range(REFINEMENTS + 1):
        a, c, error = _solve(x, losses, exponents, scale)
        cost = np.where(np.abs(error) < scale, error**2 / 2, scale * (np.abs(error) - scale / 2)).sum(2)
        best = cost.argmin(1)[:, None]
        found = np.concatenate([np.take_along_axis(value, best, 1) for value in (a, exponents, c)], axis=1)
        low, high = (
            np.take_along_axis(exponents, np.clip(best + step, 0, exponents.shape[1] - 1), 1) for step in (-1, 1)
        )
        exponents = low * (high / low) ** np.linspace(0, 1, FINER)
    return found


def _solve(
    x: np.ndarray, losses: np.ndarray, exponents: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best a and c (R, K) for every exponent (R, K), and residuals (R, K, N); ``scale``: (R, 1, 1), of Huber's loss."""
    y, u = losses[:, None], x ** -exponents[..., None]
    weight = np.ones(u.shape)
    for _ in range(ROUNDS):
        weight = weight / weight.sum(2, keepdims=True)
        u_mean, y_mean = (weight * u).sum(2), (weight * y).sum(2)
        spread = np.maximum((weight * u * u).sum(2) - u_mean**2, 1e-300)
        a = np.maximum(((weight * u * y).sum(2) - u_mean * y_mean) / spread, 0.0)
        c = y_mean - a * u_mean
        alone = (weight * u * y).sum(2) / (weight * u * u).sum(2)  # a without c
        a, c = np.where(c < 0, alone, a), np.maximum(c, 0.0)
        error = y - a[..., None] * u - c[..., None]
        weight = np.minimum(1.0, scale / np.maximum(np.abs(error), 1e-300))
    return a, c, error


def frontier(x: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices, by x, of the points whose loss no point of the same or a smaller x reaches: int64 (F,)."""
    order = np.lexsort((loss, x))
    before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
    return order[loss[order] < before]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of a and b (N,): equal values share the mean of their ranks; NaN where all are equal."""
    first, second = _ranks(a), _ranks(b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
