"""Power laws recovered from synthetic points, the frontier, and rank correlation against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from multiway.data.order import generator
from multiway.metrics.scaling import fit_power_law, frontier, spearman

X = np.geomspace(1e6, 1e10, 9)


@pytest.mark.parametrize(
    ("a", "b", "c"), [(30.0, 0.25, 0.4), (5.0, 0.1, 0.0), (400.0, 0.5, 2.0), (1e5, 1.0, 0.01), (0.0, 1.0, 0.5)]
)
def test_a_law_is_recovered(a, b, c):
    loss = a * X**-b + c
    law = fit_power_law(X, loss, generator(0))
    np.testing.assert_allclose(law(X), loss, rtol=1e-4)
    if a:
        assert (law.a, law.b, law.c) == pytest.approx((a, b, c), rel=2e-3, abs=2e-3)


def test_one_wrong_point_changes_little():
    loss = 30 * X**-0.25 + 0.4
    loss[4] += 0.3
    law = fit_power_law(X, loss, generator(0))
    assert (law.b, law.c) == pytest.approx((0.25, 0.4), abs=0.01)


def test_nine_intervals_of_ten_hold_the_truth():
    """90 % intervals of c over noisy repetitions, within three standard errors."""
    held, times = 0, 12
    for seed in range(times):
        rng = generator(seed)
        law = fit_power_law(X, 30 * X**-0.25 + 0.4 + 0.004 * rng.standard_normal(len(X)), rng)
        low, high = law.intervals()["c"]
        held += low <= 0.4 <= high
    assert held / times > 0.9 - 3 * np.sqrt(0.9 * 0.1 / times)


def test_the_band_holds_the_curve_and_widens_away_from_the_points():
    law = fit_power_law(X, 30 * X**-0.25 + 0.4 + 0.004 * generator(0).standard_normal(len(X)), generator(1))
    x = np.array([1e8, 1e13])
    low, high = law.band(x)
    assert (low < law(x)).all() and (law(x) < high).all()
    assert high[1] - low[1] > high[0] - low[0]


def test_three_points_are_too_few():
    with pytest.raises(ValueError, match="at least 4 different x, got 3"):
        fit_power_law(np.array([1.0, 2.0, 3.0, 3.0]), np.array([3.0, 2.0, 1.0, 1.0]), generator(0))


def test_the_frontier_is_what_nothing_cheaper_reaches():
    x, loss = np.array([4.0, 1.0, 2.0, 3.0, 2.0, 5.0]), np.array([2.0, 5.0, 3.0, 4.0, 6.0, 2.0])
    assert frontier(x, loss).tolist() == [1, 2, 0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys(pairs):
    a, b = (np.array(column, dtype=float) for column in zip(*pairs))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
