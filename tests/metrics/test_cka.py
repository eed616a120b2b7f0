"""Debiased CKA: identical and independent features, what it must not depend on, and the estimator by its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from multiway.metrics.cka import cka, gram, hsic


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def similar(*features: torch.Tensor) -> torch.Tensor:
    return cka(hsic(torch.stack([gram(x) for x in features])))


def test_the_estimator_is_the_mean_over_all_quadruples():
    """Song et al. 2012, eq. 4: a U-statistic over four different pictures."""
    a, b = normal(0, 6, 3), normal(1, 6, 2)
    k, m = (x @ x.T for x in (a, b))
    total = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert float(hsic(torch.stack([gram(a), gram(b)]))[0, 1]) == pytest.approx(float(sum(total)) / len(total))


def test_identical_features_are_alike_whatever_their_rotation_scale_and_mean():
    x = normal(0, 40, 8)
    rotation = torch.linalg.qr(normal(1, 8, 8))[0]
    found = similar(x, x, 3 * x @ rotation + 100)
    torch.testing.assert_close(found, torch.ones_like(found))


def test_independent_features_of_many_channels_are_near_zero():
    """Far more channels than pictures, where the biased estimate is near 1."""
    found = [float(similar(normal(i, 32, 3000), normal(1000 + i, 32, 3000))[0, 1]) for i in range(20)]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(len(found)) < 0.05
    x, y = (gram(normal(i, 32, 3000)) for i in (0, 1000))
    biased = float((x * y).sum() / (x.norm() * y.norm()))
    assert biased > 0.9


def test_batches_estimate_what_all_pictures_give():
    x = normal(0, 240, 6)
    y = x[:, :3] + 0.5 * normal(1, 240, 3)
    whole = float(similar(x, y)[0, 1])
    parts = [hsic(torch.stack([gram(x[i : i + 24]), gram(y[i : i + 24])])) for i in range(0, 240, 24)]
    assert float(cka(torch.stack(parts).mean(0))[0, 1]) == pytest.approx(whole, abs=0.03)


def test_too_few_pictures_are_refused_and_a_constant_layer_has_no_value():
    with pytest.raises(ValueError, match="at least 4 pictures, got 3"):
        similar(normal(0, 3, 5))
    assert math.isnan(float(similar(normal(0, 8, 5), torch.ones(8, 5))[0, 1]))
