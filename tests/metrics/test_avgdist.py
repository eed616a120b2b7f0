"""AvgDist against scipy's distance transform and the published-mask table of vision.md 7.2."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from multiway.data.hide import hide_cells, hide_square
from multiway.data.order import generator
from multiway.errors import ConfigError
from multiway.metrics.avgdist import average_distance

MASKS = 40
TABLE_MASKS = 100
"""At least so many masks are behind each value of the table."""

TABLE = {  # at 192 px, by block in pixels, ratios .1 to .9
    4: (1.32, 1.40, 1.49, 1.63, 1.81, 2.08, 2.51, 3.24, 5.02),
    8: (2.08, 2.26, 2.47, 2.75, 3.14, 3.70, 4.55, 6.11, 9.88),
    16: (3.78, 4.16, 4.63, 5.24, 6.04, 7.24, 9.04, 12.5, 20.4),
    32: (7.65, 8.68, 9.49, 11.1, 12.6, 15.2, 20.0, 26.2, 46.2),
    64: (17.1, 19.4, 22.0, 25.2, 29.9, 36.2, 47.6, 67.9),
}


def in_pixels(hide: np.ndarray, side: int, patch: int) -> np.ndarray:
    return hide.reshape(side, side).repeat(patch, axis=0).repeat(patch, axis=1)


@given(height=st.integers(1, 40), width=st.integers(1, 40), ratio=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_it_is_the_exact_distance(height, width, ratio, seed):
    hide = np.random.default_rng(seed).random((height, width)) < ratio
    if not hide.any() or hide.all():
        with pytest.raises(ConfigError, match="AvgDist needs hidden and visible"):
            average_distance(hide)
    else:
        assert average_distance(hide) == pytest.approx(distance_transform_edt(hide)[hide].mean(), rel=1e-12)


def test_one_visible_corner():
    hide = np.ones((3, 4), dtype=bool)
    hide[2, 0] = False
    expected = [math.hypot(2 - row, column) for row in range(3) for column in range(4)]
    assert average_distance(hide) == pytest.approx(sum(expected) / 11)


@pytest.mark.parametrize(
    ("block", "ratio", "expected"),
    [(block, (i + 1) / 10, value) for block, row in TABLE.items() for i, value in enumerate(row)],
)
def test_random_cells_agree_with_the_table(block, ratio, expected):
    values = [
        average_distance(in_pixels(hide_cells((48, 48), block // 4, ratio, generator(seed)), 48, 4))
        for seed in range(MASKS)
    ]
    rounding = 0.005 if expected < 10 else 0.05
    error = np.std(values) * math.sqrt(1 / MASKS + 1 / TABLE_MASKS)
    assert abs(np.mean(values) - expected) < 3 * error + rounding


@pytest.mark.parametrize(
    ("patch", "ratio", "expected"),
    [(32, 0.6, 15.2), (16, 0.75, 10.1), (16, 0.4, 5.2)],
)
def test_at_224_pixels(patch, ratio, expected):
    side = 224 // patch
    hides = [hide_cells((side, side), 1, ratio, generator(seed)) for seed in range(MASKS)]
    values = [average_distance(in_pixels(hide, side, patch)) for hide in hides]
    assert abs(np.mean(values) - expected) < 3 * np.std(values) * math.sqrt(1 / MASKS + 1 / TABLE_MASKS) + 0.05


@pytest.mark.parametrize(("ratio", "expected"), [(0.1, 10.7), (0.2, 14.8), (0.4, 20.7), (0.6, 25.3), (0.8, 29.2)])
def test_one_central_square(ratio, expected):
    hide = hide_square((192, 192), ratio, True, generator(0)).reshape(192, 192)
    assert average_distance(hide) == pytest.approx(expected, abs=0.051)


def test_the_central_square_of_61_pixels():
    hide = hide_square((192, 192), 0.1, True, generator(0)).reshape(192, 192)
    assert hide.sum() == 61**2
    assert average_distance(hide) == pytest.approx(10.672, abs=5e-4)
