"""Agreement by hand, against scikit-learn and scipy, and where it is not defined."""

from __future__ import annotations

import numpy as np
import pytest

from multiway.errors import NumericsError
from multiway.metrics.agreement import f1, matthews, pearson, spearman


def test_matthews_by_hand() -> None:
    """6 true positives, 1 false, 2 missed, 3 true negatives: (6 * 3 - 1 * 2) / sqrt(7 * 8 * 4 * 5)."""
    predicted = [1] * 7 + [0] * 5
    truth = [1] * 6 + [0] + [1] * 2 + [0] * 3
    assert matthews(predicted, truth) == pytest.approx(16 / np.sqrt(7 * 8 * 4 * 5))
    assert matthews(["yes" if p else "no" for p in predicted], ["yes" if t else "no" for t in truth]) == pytest.approx(
        matthews(predicted, truth)
    )
    assert matthews([0, 1, 0, 1], [1, 0, 1, 0]) == -1 and matthews([0, 1, 2], [0, 1, 2]) == 1


def test_f1_by_hand() -> None:
    """Two of three found ones are right, two of four right ones found: precision 2 / 3, recall 1 / 2."""
    assert f1([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]) == pytest.approx(2 / (3 / 2 + 2))
    assert f1([1, 1], [1, 1]) == 1


def test_equal_numbers_share_their_rank() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)."""
    assert spearman([1, 5, 5, 9], [0.1, 0.2, 0.3, 7]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert pearson([1, 2, 3], [10, 20, 30]) == 1 and pearson([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, 3], [1, 10, 1000]) == 1 and pearson([1, 2, 3], [1, 10, 1000]) < 1


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(("count", "classes"), [(2, 2), (50, 2), (400, 3), (31, 7)])
def test_classes_as_in_scikit_learn(count: int, classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(count)
    for _ in range(20):
        truth = rng.integers(classes, size=count)
        predicted = np.where(rng.random(count) < 0.5, truth, rng.integers(classes, size=count))
        assert matthews(predicted, truth) == pytest.approx(metrics.matthews_corrcoef(truth, predicted), abs=1e-12)
        own, right = predicted == 1, truth == 1
        assert f1(own, right) == pytest.approx(metrics.f1_score(right, own, zero_division=0), abs=1e-12)


@pytest.mark.parametrize("levels", [3, 10_000])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e150])
def test_numbers_as_in_scipy(levels: int, scale: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(levels)
    for count in (3, 20, 300):
        truth = rng.integers(levels, size=count) / levels * 5
        truth[:2] = 0, 5
        predicted = truth + rng.standard_normal(count)
        assert pearson(predicted * scale, truth) == pytest.approx(stats.pearsonr(predicted, truth)[0], abs=1e-12)
        assert spearman(predicted * scale, truth) == pytest.approx(stats.spearmanr(predicted, truth)[0], abs=1e-12)


def test_what_is_not_defined_is_zero() -> None:
    assert matthews([1, 1, 1], [0, 1, 0]) == 0 and matthews([0, 1], [1, 1]) == 0 and matthews([2], [2]) == 0
    assert f1([0, 0], [0, 1]) == 0 and f1([1, 0], [0, 0]) == 0 and f1([0], [0]) == 0
    for measure in (pearson, spearman):
        assert measure([0.1] * 7, range(7)) == 0 and measure(range(7), [0.1] * 7) == 0
        assert measure([3], [4]) == 0 and measure([], []) == 0


@pytest.mark.parametrize("measure", [pearson, spearman])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_diverged_has_no_correlation(measure, bad: float) -> None:
    with pytest.raises(NumericsError, match="diverged"):
        measure([1.0, bad], [1.0, 2.0])
    with pytest.raises(NumericsError, match="diverged"):
        measure([1.0, 2.0], [bad, 2.0])
