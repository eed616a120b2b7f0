from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from multiway.nn.position import (
    bias_rows,
    relative_index,
    resize_bias_table,
    resize_patch_kernel,
    resize_positions,
    sincos_positions,
)

STUBS = Path(__file__).parents[1] / "parity" / "stubs"


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


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((5, 3), (2, 6))])
def test_antialiasing_is_another_kernel_also_when_growing(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(old[0] * old[1], 4, generator=torch.Generator().manual_seed(0))
    smooth = resize_positions(table, old, new, extra=0, antialias=True)
    picture = table.T.reshape(1, 4, *old)
    want = F.interpolate(picture, size=new, mode="bicubic", align_corners=False, antialias=True)
    assert torch.equal(smooth, want.flatten(2)[0].T)
    assert (smooth - resize_positions(table, old, new, extra=0)).abs().max() > 0.05


def test_sines_are_those_of_mae() -> None:
    table = sincos_positions(768, (14, 14), prefix=1)
    assert table.shape == (197, 768) and not table[0].any()
    got = table[1 + 2 * 14 + 3, [0, 1, 191, 192, 383, 384, 385, 576, 767]]
    want = [0.141120, 0.278380, 0.000315, -0.989992, 1.0, 0.909297, 0.944237, -0.416147, 1.0]
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6)
    assert table.double().sum().item() == pytest.approx(69594.4939, abs=1e-3)


def test_sines_of_a_grid_that_is_not_square_are_those_of_its_places() -> None:
    square = sincos_positions(16, (7, 7)).view(7, 7, 16)
    assert torch.equal(sincos_positions(16, (3, 7)), square[:3].flatten(0, 1))
    assert torch.equal(sincos_positions(16, (7, 2)), square[:, :2].flatten(0, 1))
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_positions(6, (2, 2))


def test_the_index_of_a_window_is_that_of_swin() -> None:
    index = relative_index((7, 7))
    assert index.dtype == torch.int64 and index.shape == (49, 49)
    places = [(0, 0), (0, 1), (1, 0), (0, 7), (7, 0), (0, 48), (48, 0)]
    assert [index[place].item() for place in places] == [84, 83, 85, 71, 97, 0, 168]


def test_the_index_with_a_class_token_is_that_of_beit() -> None:
    index = relative_index((14, 14), prefix=1)
    assert index.shape == (197, 197) and bias_rows((14, 14), prefix=1) == 732
    places = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 2), (1, 196), (196, 1)]
    assert [index[place].item() for place in places] == [731, 729, 730, 364, 363, 0, 728]


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_index_by_brute_force(prefix: int) -> None:
    rows, columns = 2, 5
    index, last = relative_index((rows, columns), prefix), bias_rows((rows, columns), prefix) - 1
    places = [None] * prefix + [(r, c) for r in range(rows) for c in range(columns)]
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            if query is None or key is None:
                want = last if query is key else last - 2 if query is None else last - 1
            else:
                want = (query[0] - key[0] + rows - 1) * (2 * columns - 1) + query[1] - key[1] + columns - 1
            assert index[i, j] == want
    assert sorted(index.unique().tolist()) == list(range(last + 1))
    with pytest.raises(ValueError, match="one class token or none, got 2"):
        relative_index((rows, columns), 2)


def surface(rows: int, columns: int, slope: float = 0.0) -> torch.Tensor:
    """The specs' test surface as a table with one head."""
    i, j = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return ((0.3 * i).sin() + slope * (0.2 * j).cos() + 0.01 * i * j).reshape(-1, 1)


@pytest.mark.parametrize(
    ("old", "new", "slope", "want"),
    [
        (7, 14, 1, {(0, 0): 1.0, (0, 26): -0.737393, (13, 13): 1.696205, (13, 14): 1.563815, (14, 13): 1.645567,
                    (20, 5): 1.160744}),
        (14, 7, 1, {(0, 0): 1.492476, (6, 6): 0.145345, (12, 3): 0.883429}),
        (14, 24, 0, {(0, 0): 0.0, (22, 24): 1.237480, (23, 23): 1.002234, (10, 30): 1.684038, (46, 46): 7.758543}),
    ],
)  # fmt: skip
def test_a_bias_table_is_transferred_geometrically(
    old: int, new: int, slope: float, want: dict[tuple[int, int], float]
) -> None:
    side = 2 * new - 1
    got = resize_bias_table(surface(2 * old - 1, 2 * old - 1, slope), (old, old), (new, new), extra=0)
    assert {place: got.view(side, side)[place].item() for place in want} == pytest.approx(want, abs=1e-4)


def coordinates(old: int, new: int) -> np.ndarray:
    """Where BEiT's loader takes the old offsets to lie."""
    least, most = 1.01, 1.5
    while most - least > 1e-6:
        ratio = (least + most) / 2
        if sum(ratio**k for k in range(old - 1)) > new - 1:
            most = ratio
        else:
            least = ratio
    distances = np.cumsum([ratio**k for k in range(old - 1)])
    return np.concatenate([-distances[::-1], [0.0], distances])


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((14, 7), (5, 16)), ((3, 40), (4, 32))])
def test_the_spline_is_fitpacks(old: tuple[int, int], new: tuple[int, int]) -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn(bias_rows(old, 1), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = resize_bias_table(table, old, new, extra=3)
    assert torch.equal(got[-3:], table[-3:])
    y, x = (coordinates(a, b) for a, b in zip(old, new))
    dy, dx = (np.arange(1 - n, n) for n in new)
    for head in range(3):
        spline = interpolate.RectBivariateSpline(y, x, table[:-3, head].reshape(len(y), len(x)).numpy(), s=0)
        want = spline(dy.clip(y[0], y[-1]), dx.clip(x[0], x[-1])).reshape(-1)
        np.testing.assert_allclose(got[:-3, head].numpy(), want, rtol=0, atol=1e-10)


def test_one_axis_may_keep_its_size_and_tiny_windows_work() -> None:
    table = torch.randn(bias_rows((4, 6)), 2, generator=torch.Generator().manual_seed(0))
    wider = resize_bias_table(table, (4, 6), (4, 9), extra=0).view(7, 17, 2)
    torch.testing.assert_close(wider[:, 8], table.view(7, 11, 2)[:, 5], rtol=0, atol=1e-6)
    parabola = torch.tensor([4.0, 1.0, 2.0]).view(3, 1)  # through -1, 0, 1; held at its edges beyond
    assert resize_bias_table(parabola, (2, 1), (3, 1), extra=0).flatten().tolist() == pytest.approx([4, 4, 1, 2, 2])
    assert resize_bias_table(torch.full((1, 2), 5.0), (1, 1), (2, 3), extra=0).eq(5).all()


def test_a_bias_table_may_be_resized_as_a_picture() -> None:
    table = torch.randn(13 * 13, 4, generator=torch.Generator().manual_seed(0))
    want = F.interpolate(table.T.reshape(1, 4, 13, 13), size=(23, 23), mode="bicubic").flatten(2)[0].T
    assert torch.equal(resize_bias_table(table, (7, 7), (12, 12), extra=0, method="bicubic"), want)


def test_a_bias_table_stays_or_is_refused() -> None:
    table = torch.zeros(bias_rows((3, 2), 1), 4, dtype=torch.bfloat16)
    assert resize_bias_table(table, (3, 2), (3, 2), extra=3) is table
    assert resize_bias_table(table, (3, 2), (2, 5), extra=3).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="18 rows is not a window of 3x2 and 0 extra rows"):
        resize_bias_table(table, (3, 2), (2, 2), extra=0)


@pytest.mark.parametrize("patch", [(16, 16), (14, 9)])
def test_a_larger_kernel_sees_in_larger_patches_what_the_old_one_saw(patch: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel, picture = torch.randn(5, 3, 8, 8, generator=generator), torch.randn(7, 3, 8, 8, generator=generator)
    larger = F.interpolate(picture, size=patch, mode="bicubic", align_corners=False, antialias=True)
    want = picture.flatten(1) @ kernel.flatten(1).T
    got = larger.flatten(1) @ resize_patch_kernel(kernel, patch).flatten(1).T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert resize_patch_kernel(kernel, (8, 8)) is kernel


PEER = """
import torch
from timm.layers import resample_patch_embed
from multiway.nn.position import resize_patch_kernel
kernel = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
for patch in ((14, 14), (8, 8), (32, 20)):
    torch.testing.assert_close(resize_patch_kernel(kernel, patch), resample_patch_embed(kernel, list(patch)))
"""


def test_kernels_are_resized_as_in_timm() -> None:
    env = {**os.environ, "PYTHONPATH": str(STUBS)}
    result = subprocess.run([sys.executable, "-c", PEER], env=env, capture_output=True, text=True)
    if "No module named 'timm'" in result.stderr:
        pytest.skip("timm is not installed")
    assert not result.returncode, result.stderr
