"""Statistics of attention maps against hand-made maps and loops over every entry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from multiway.metrics.attention import head_statistics


def grid(rows: int, columns: int, px: float) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(rows) * float(px), torch.arange(columns) * float(px))[None]


def every(tokens: int) -> torch.Tensor:
    return torch.ones(1, tokens, dtype=torch.bool)


def test_maps_made_by_hand():
    """Two patches, 16 px apart: one head looks at itself, one at the other, one at both alike."""
    heads = torch.stack([torch.eye(2), 1 - torch.eye(2), torch.full((2, 2), 0.5)])
    found = head_statistics(heads[None, None], grid(1, 2, 16), every(2))
    assert found.distance.tolist() == [[0.0, 16.0, 8.0]]
    assert found.entropy[0].tolist() == pytest.approx([0.0, 0.0, math.log(2)], abs=1e-6)
    opposite, half = 0.0, 1 / math.sqrt(2)
    assert float(found.cosine) == pytest.approx((opposite + 2 * half) / 3)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_a_loop_over_every_entry_agrees(prefix):
    """Three pictures, four heads, a grid of 3x4 patches behind class tokens, which are dropped."""
    rng = np.random.default_rng(prefix)
    tokens = prefix + 12
    maps = torch.from_numpy(rng.standard_normal((3, 1, 4, tokens, tokens))).float().mul(2).softmax(-1)
    places = torch.cat([torch.zeros(1, prefix, 2), grid(3, 4, 8)], dim=1)
    real = torch.arange(tokens)[None] >= prefix
    found = head_statistics(maps, places, real)
    own = maps[:, 0, :, prefix:, prefix:].double().numpy()
    own /= own.sum(-1, keepdims=True)
    at = [(8.0 * (i // 4), 8.0 * (i % 4)) for i in range(12)]
    for picture in range(3):
        for head in range(4):
            rows = own[picture, head]
            far = np.mean([sum(rows[q, k] * math.dist(at[q], at[k]) for k in range(12)) for q in range(12)])
            assert float(found.distance[picture, head]) == pytest.approx(far, rel=1e-5)
            assert float(found.entropy[picture, head]) == pytest.approx(-(rows * np.log(rows)).sum(-1).mean(), rel=1e-4)
        pairs = [(a, b) for a in range(4) for b in range(a)]
        apart = [
            (rel_entr(own[picture, a], own[picture, b]) + rel_entr(own[picture, b], own[picture, a])).sum(-1).mean()
            for a, b in pairs
        ]
        assert float(found.divergence[picture]) == pytest.approx(np.mean(apart) / 2, rel=1e-4)
        flat = own[picture].reshape(4, -1)
        flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        assert float(found.cosine[picture]) == pytest.approx(np.mean([flat[a] @ flat[b] for a, b in pairs]), rel=1e-5)


def test_padding_of_windows_counts_neither_as_looking_nor_as_looked_at():
    maps = torch.rand(2, 3, 2, 4, 4).softmax(-1)
    places = torch.rand(3, 4, 2) * 50
    real = torch.ones(3, 4, dtype=torch.bool)
    real[2, 1] = False
    changed = maps.clone()
    changed[:, 2, :, 1] = torch.tensor([1.0, 0, 0, 0])
    changed[:, 2, :, :, 1] += 0.7
    places_changed = places.clone()
    places_changed[2, 1] = 1e4
    before, after = head_statistics(maps, places, real), head_statistics(changed, places_changed, real)
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b)


def test_one_head_has_no_diversity():
    found = head_statistics(torch.full((1, 1, 1, 4, 4), 0.25), grid(2, 2, 4), every(4))
    assert math.isnan(float(found.divergence)) and math.isnan(float(found.cosine))
    assert float(found.entropy) == pytest.approx(math.log(4))
    assert float(found.distance) == pytest.approx((0 + 4 + 4 + 4 * math.sqrt(2)) / 4)


def test_heads_that_look_alike_differ_by_nothing():
    maps = torch.rand(1, 1, 1, 9, 9).softmax(-1).expand(-1, -1, 3, -1, -1)
    found = head_statistics(maps, grid(3, 3, 1), every(9))
    assert float(found.divergence) == pytest.approx(0, abs=1e-5)
    assert float(found.cosine) == pytest.approx(1, abs=1e-5)
