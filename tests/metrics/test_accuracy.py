"""Top-1 accuracy by hand, its ties and its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from multiway.errors import NumericsError
from multiway.metrics.accuracy import top1


def test_counts_the_rows_whose_label_wins():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 2.0, 9.0], [7.0, 8.0, 0.0]])
    assert top1(scores, np.array([0, 2, 2, 1])) == 0.75


@pytest.mark.parametrize("classes", [2, 7])
def test_constant_scores_give_chance(classes):
    assert top1(np.zeros((30, classes)), np.arange(30) % classes) == pytest.approx(1 / classes)


def test_a_tie_for_the_first_place_is_shared():
    assert top1(np.array([[1.0, 1.0, 0.0]]), np.array([0])) == 0.5
    assert top1(np.array([[1.0, 1.0, 0.0]]), np.array([2])) == 0.0


def test_nan_is_refused():
    with pytest.raises(NumericsError):
        top1(np.array([[1.0, np.nan]]), np.array([0]))
