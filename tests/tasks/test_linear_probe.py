"""Probes of frozen features, beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway.errors import ConfigError
from multiway.tasks.linear_probe import NEIGHBOURS, PENALTIES, TEMPERATURE, choose_penalty, evaluate, fit_linear, vote

CLASSES = 4


def clusters(count: int, seed: int, spread: float = 1.2) -> tuple[Tensor, np.ndarray]:
    """Features of overlapping classes, channels of different sizes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, 10))
    labels = rng.integers(CLASSES, size=count)
    features = (centres[labels] + spread * rng.normal(size=(count, 10))) * np.linspace(0.5, 5, 10) + 3
    return torch.from_numpy(features.astype(np.float32)), labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_the_linear_map_is_that_of_logistic_regression(penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(200, 1)
    x = (features - features.mean(0)) / features.std(0)
    weight, bias = fit_linear(x, torch.from_numpy(labels), CLASSES, penalty)
    reference = linear_model.LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=10_000)
    reference.fit(x.numpy(), labels)
    want = torch.from_numpy(reference.predict_proba(x.numpy())).float()
    torch.testing.assert_close((x @ weight.T + bias).softmax(1), want, rtol=0, atol=1e-3)


def test_neighbours_vote_as_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    features, labels = clusters(150, 1)
    test, _ = clusters(80, 2)
    reference = neighbors.KNeighborsClassifier(
        NEIGHBOURS, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(features.numpy(), labels)
    votes = vote(features, torch.from_numpy(labels), test, CLASSES)
    want = torch.from_numpy(reference.predict_proba(test.numpy())).float()
    torch.testing.assert_close(votes / votes.sum(1, keepdim=True), want, rtol=0, atol=1e-4)


def test_both_find_classes_that_are_apart_and_none_where_there_are_none() -> None:
    (features, labels), (test, truth) = clusters(400, 1, 0.3), clusters(200, 2, 0.3)
    found = evaluate(features, labels, test, truth)
    assert found["linear"] > 0.98 and found["knn"] > 0.95
    assert found["classes"] == CLASSES and found["chance"] == 1 / CLASSES and found["penalty"] in PENALTIES
    noise = evaluate(torch.randn(400, 10), labels, torch.randn(200, 10), truth)
    assert noise["linear"] < 0.4 and noise["knn"] < 0.4


def test_the_linear_map_does_not_depend_on_the_scale_of_features() -> None:
    (features, labels), (test, truth) = clusters(300, 1), clusters(200, 2)
    scale = torch.logspace(-2, 2, 10)
    plain, scaled = evaluate(features, labels, test, truth), evaluate(features * scale, labels, test * scale, truth)
    assert scaled["linear"] == pytest.approx(plain["linear"], abs=0.015)


def test_the_penalty_is_chosen_without_the_test() -> None:
    """Many channels, one of which says something, in noise: shrinking is worth it. The same choice every time."""
    torch.manual_seed(3)
    x = torch.randn(600, 200)
    y = (x[:, 0] + 0.7 * torch.randn(600) > 0).long()
    chosen = choose_penalty(x, y, 2)
    assert chosen >= 1e-2 and choose_penalty(x, y, 2) == chosen


def test_more_neighbours_than_pictures_are_all_of_them() -> None:
    features, labels = torch.eye(3), torch.tensor([0, 1, 1])
    votes = vote(features, labels, torch.eye(3)[:1], 2)
    torch.testing.assert_close(votes / votes.sum(), torch.tensor([[1.0, 0.0]]), rtol=0, atol=1e-5)


def test_what_cannot_be_probed_is_refused() -> None:
    features = torch.randn(6, 3)
    with pytest.raises(ConfigError, match="at least two classes"):
        evaluate(features, [0] * 6, features, [0] * 6)
    with pytest.raises(ConfigError, match="no other ones in the test"):
        evaluate(features, [0, 1] * 3, features, [0, 2] * 3)
