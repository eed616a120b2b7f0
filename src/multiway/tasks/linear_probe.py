"""How much frozen features know: a linear classifier and nearest neighbours on top of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.errors import ConfigError
from multiway.metrics.accuracy import top1

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the squared norm that are tried; the best on held-out training pictures is taken."""

HELD_OUT = 0.2
"""Share of the training features that chooses the penalty."""

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the weighted vote of neighbours (DINO's protocol)."""


def evaluate(
    features: Tensor, labels: Sequence[int] | np.ndarray, test: Tensor, test_labels: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """Accuracy of both on test features: ``{"linear", "knn", "penalty", "chance", "classes"}``, shares in [0, 1].

    features (N, D), test (M, D): float; labels: int, in [0, C). Features are standardised by the training ones first.
    Raises ConfigError for fewer than two classes, or a test class that no training picture has.
    """
    y, truth = torch.as_tensor(np.asarray(labels)).long(), np.asarray(test_labels)
    classes = int(y.max()) + 1
    if len(y.unique()) < 2 or not np.isin(truth, y.numpy()).all():
        raise ConfigError(f"a probe needs at least two classes, and no other ones in the test; found {classes} classes")
    variance, mean = torch.var_mean(features.float(), dim=0)
    scale = (variance + 1e-6).rsqrt()  # as the batch norm in front of MAE's probe
    x, t = (features.float() - mean) * scale, (test.float() - mean) * scale
    penalty = choose_penalty(x, y, classes)
    weight, bias = fit_linear(x, y, classes, penalty)
    return {
        "linear": top1((t @ weight.T + bias).numpy(), truth),
        "knn": top1(vote(features, y, test, classes).numpy(), truth),
        "penalty": penalty,
        "chance": 1 / classes,
        "classes": classes,
    }


def choose_penalty(x: Tensor, y: Tensor, classes: int) -> float:
    """The penalty that does best on a held-out part of the training features; the same part every time."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    own, other = order[round(HELD_OUT * len(x)) :], order[: round(HELD_OUT * len(x))]

    def score(penalty: float) -> float:
        weight, bias = fit_linear(x[own], y[own], classes, penalty)
        return top1((x[other] @ weight.T + bias).numpy(), y[other].numpy())

    return max(PENALTIES, key=score)


def fit_linear(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression to convergence: weight (C, D), bias (C,).

    It minimises the mean cross-entropy plus ``penalty`` times half the squared norm of the weight, by L-BFGS over all
    features at once.
    """
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + penalty * weight.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def vote(features: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Votes of the nearest training features by cosine, weighted by exp(cosine / TEMPERATURE): (M, C)."""
    near = F.normalize(test.float(), dim=-1) @ F.normalize(features.float(), dim=-1).T
    cosine, index = near.topk(min(NEIGHBOURS, len(features)), dim=-1)
    votes = torch.zeros(len(test), classes)
    return votes.scatter_add_(1, labels[index], (cosine / TEMPERATURE).exp())
