"""AvgDist: how far from anything visible a hidden pixel is, which foretells what masked pictures teach (SimMIM)."""

from __future__ import annotations

import numpy as np

from multiway.errors import ConfigError


def average_distance(hide: np.ndarray) -> float:
    """Mean over the hidden pixels of the Euclidean distance to the nearest visible one, in pixels.

    hide: bool (H, W), True = hidden. The value grows with the resolution, which belongs beside it.

    Raises ConfigError when no pixel is hidden or none is visible. Source: vision.md 7.2.
    """
    if not hide.any() or hide.all():
        raise ConfigError(f"{int(hide.sum())} of {hide.size} pixels are hidden: AvgDist needs hidden and visible ones")
    return float(np.sqrt(_squared_distance(hide)[hide]).mean())


def _squared_distance(hide: np.ndarray) -> np.ndarray:
    """Squared distance of every pixel to the nearest visible one: int64 (H, W).

    Exact and separable: down the columns the nearest visible pixel lies where a running extreme says, and along the
    rows the result is the least of (column distance)^2 + offset^2, over offsets until none can be less.
    """
    height, width = hide.shape
    rows = np.arange(height)[:, None]
    far = height + width  # more than any distance
    above = np.maximum.accumulate(np.where(hide, -far, rows), axis=0)
    below = np.minimum.accumulate(np.where(hide, 2 * far, rows)[::-1], axis=0)[::-1]
    column = np.minimum(np.minimum(rows - above, below - rows), far) ** 2
    squared = column.copy()
    for offset in range(1, width):
        if offset**2 >= squared.max():
            break
        for here, there in ((np.s_[:, offset:], np.s_[:, :-offset]), (np.s_[:, :-offset], np.s_[:, offset:])):
            squared[here] = np.minimum(squared[here], column[there] + offset**2)
    return squared
