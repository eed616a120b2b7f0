from __future__ import annotations

import pytest
import torch

from multiway.nn.position import resize_positions


def cubic(t: float) -> list[float]:
    """Weights of the four neighbours at distances 1 + t, t, 1 - t, 2 - t: the cubic kernel with a = -.75."""
    a = -0.75

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


def stretched(line: list[float], size: int) -> list[float]:
    """Bicubic along one axis, corners not aligned, edges repeated."""
    result = []
    for i in range(size):
        place = (i + 0.5) * len(line) / size - 0.5
        left = int(place // 1)
        near = [line[min(max(left + k, 0), len(line) - 1)] for k in (-1, 0, 1, 2)]
        result.append(sum(w * x for w, x in zip(cubic(place - left), near)))
    return result


def test_a_grid_is_interpolated_by_the_cubic_kernel() -> None:
    old, new = (3, 2), (5, 4)
    table = torch.randn(1 + 6, 2, generator=torch.Generator().manual_seed(0))
    got = resize_positions(table, old, new, extra=1)
    assert torch.equal(got[0], table[0])
    for channel in range(2):
        rows = [stretched(row, new[1]) for row in table[1:, channel].view(old).tolist()]
        columns = [stretched(list(column), new[0]) for column in zip(*rows)]
        want = torch.tensor(list(zip(*columns)))
        torch.testing.assert_close(got[1:, channel].view(new), want, rtol=0, atol=1e-5)


def test_the_same_grid_is_left_alone_and_the_dtype_stays() -> None:
    table = torch.randn(3 + 4, 2, dtype=torch.bfloat16)
    assert resize_positions(table, (2, 2), (2, 2), extra=3) is table
    assert resize_positions(table, (2, 2), (3, 1), extra=3).dtype == torch.bfloat16


def test_a_table_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="7 rows is not 1 extra rows and a grid of 2x2"):
        resize_positions(torch.zeros(7, 2), (2, 2), (3, 3), extra=1)
