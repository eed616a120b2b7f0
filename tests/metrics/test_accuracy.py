"""Accuracy by hand, its ties and its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from multiway.errors import NumericsError
from multiway.metrics.accuracy import class_top1, top1, topk


def test_counts_the_rows_whose_label_wins():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 2.0, 9.0], [7.0, 8.0, 0.0]])
    assert top1(scores, np.array([0, 2, 2, 1])) == 0.75


@pytest.mark.parametrize("classes", [2, 7])
def test_constant_scores_give_chance(classes):
    scores, labels = np.zeros((30, classes)), np.arange(30) % classes
    assert [top1(scores, labels), class_top1(scores, labels)] == pytest.approx([1 / classes] * 2)
    assert topk(scores, labels, 5) == pytest.approx(min(5 / classes, 1))


def test_a_tie_for_the_first_place_is_shared():
    assert top1(np.array([[1.0, 1.0, 0.0]]), np.array([0])) == 0.5
    assert top1(np.array([[1.0, 1.0, 0.0]]), np.array([2])) == 0.0


def test_a_tie_for_the_last_place_is_shared():
    scores = np.array([[4.0, 3.0, 2.0, 2.0, 2.0, 1.0]])
    assert [topk(scores, np.array([label]), 4) for label in range(6)] == pytest.approx([1, 1, 2 / 3, 2 / 3, 2 / 3, 0])


def test_classes_count_alike_however_frequent():
    scores, labels = np.eye(4)[[0, 0, 0, 3]], np.array([0, 0, 0, 2])
    assert (top1(scores, labels), class_top1(scores, labels)) == (0.75, 0.5)


@pytest.mark.parametrize("measure", [top1, class_top1, lambda scores, labels: topk(scores, labels, 2)])
def test_nan_is_refused(measure):
    with pytest.raises(NumericsError):
        measure(np.array([[1.0, np.nan]]), np.array([0]))
