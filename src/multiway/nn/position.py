"""Positions: learned tables, fixed sines, relative offsets in a window, and their transfer to other sizes.

Sizes are (rows, columns) of patches throughout; nothing needs to be square.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_RATIO, MOST_RATIO, RATIO_ERROR = 1.01, 1.5, 1e-6
"""Where the ratio of geometric distances is searched, and how closely (BEiT's fine-tuning loader)."""


def sincos_positions(dim: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Fixed sine and cosine positions of a grid, row by row: float32 (prefix + rows * columns, dim).

    The first half of the channels tells the column, the second the row; each half is sines, then cosines, of
    wavelengths 2 pi to 20000 pi. ``prefix``: rows of zeros in front, for class tokens. Raises ValueError unless ``dim``
    is a multiple of 4. Source: MAE.
    """
    if dim % 4:
        raise ValueError(f"sine positions need a width that is a multiple of 4, got {dim}")
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (column, row)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, 0, prefix, 0)).float()


def relative_index(window: tuple[int, int], prefix: int = 0) -> Tensor:
    """Row of the relative bias table for every query and key of a window: int64 (N, N), N = prefix + rows * columns.

    ``prefix``: 1 = a class token comes first, and the table has three rows more, at its end: class token to patch,
    patch to class token, class token to itself. The table has (2 rows - 1)(2 columns - 1) rows before those; its
    offsets are query minus key, row by row. Raises ValueError for another prefix. Source: Swin; BEiT with prefix 1.
    """
    if prefix not in (0, 1):
        raise ValueError(f"a window has one class token or none, got {prefix}")
    rows, columns = window
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
    down, right = place[:, :, None] - place[:, None]
    index = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
    if not prefix:
        return index
    last = bias_rows(window, prefix) - 1
    index = F.pad(index, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = last - 2, last - 1, last
    return index


def joint_index(window: tuple[int, int], longest: int) -> Tensor:
    """Row of the table for every query and key of a picture and a text behind it: int64 (N, N), N = 1 + rows * columns
    + ``longest``.

    The table has the rows of `relative_index` with prefix 1, then one of text looking at the picture, one of the
    picture looking at text, 2 ``longest`` - 3 offsets of words, key minus query, and three of the text's first token:
    to a word, from a word, to itself. Source: masked.md 5.1, VLMo.
    """
    pictures = relative_index(window, prefix=1)
    rows, patches = bias_rows(window, prefix=1), len(pictures)
    place = torch.arange(longest)
    texts = place - place[:, None] + rows + longest
    last = rows + 2 * longest + 1
    texts[0], texts[:, 0], texts[0, 0] = last - 2, last - 1, last
    index = torch.empty(patches + longest, patches + longest, dtype=torch.int64)
    index[:patches, :patches], index[patches:, patches:] = pictures, texts
    index[patches:, :patches], index[:patches, patches:] = rows, rows + 1
    return index


def bias_rows(window: tuple[int, int], prefix: int = 0) -> int:
    """Rows of the relative bias table that `relative_index` points into."""
    return (2 * window[0] - 1) * (2 * window[1] - 1) + 3 * prefix


def resize_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], extra: int, antialias: bool = False
) -> Tensor:
    """Interpolate a position table (extra + rows * columns, D) from the ``old`` to the ``new`` (rows, columns) grid.

    The first ``extra`` rows (class token and the like) are kept. ``antialias``: the smoother kernel, another one also
    when growing; it belongs to the weights: False for BEiT, MAE and DeiT, True for timm's. Bicubic, corners not
    aligned. Raises ValueError when the table does not belong to the old grid.
    """
    if len(table) != extra + old[0] * old[1]:
        raise ValueError(f"a table of {len(table)} rows is not {extra} extra rows and a grid of {old[0]}x{old[1]}")
    if old == new:
        return table
    grid = table[extra:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    grid = grid.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
    return torch.cat([table[:extra], grid])


def resize_bias_table(
    table: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    extra: int,
    method: Literal["geometric", "bicubic"] = "geometric",
) -> Tensor:
    """Transfer a relative bias table ((2 rows - 1)(2 columns - 1) + extra, H) from the ``old`` to the ``new`` window.

    The last ``extra`` rows (of the class token) are kept. ``geometric``: old offsets are taken to lie at distances that
    grow by one ratio, so that the farthest old meets the farthest new one, and a cubic spline through them is read at
    every new offset, held at its edge beyond; BEiT, SimMIM and their line. ``bicubic``: the table is resized as a
    picture; Swin's supervised fine-tuning. Raises ValueError when the table does not belong to the old window.
    """
    sides, sizes = [2 * n - 1 for n in old], [2 * n - 1 for n in new]
    if len(table) != sides[0] * sides[1] + extra:
        raise ValueError(f"a table of {len(table)} rows is not a window of {old[0]}x{old[1]} and {extra} extra rows")
    if tuple(old) == tuple(new):
        return table
    split = len(table) - extra
    grid = table[:split].T.reshape(1, -1, *sides)
    if method == "bicubic":
        grid = F.interpolate(grid.float(), size=sizes, mode="bicubic", align_corners=False)
    else:
        down, right = (_geometric(a, b).to(table.device) for a, b in zip(old, new, strict=True))
        grid = down @ grid.double() @ right.T
    return torch.cat([grid.flatten(2)[0].T.to(table.dtype), table[split:]])


def resize_patch_kernel(kernel: Tensor, patch: tuple[int, int]) -> Tensor:
    """Transfer a patch embedding's kernel (D, C, h, w) to patches of other (rows, columns) of pixels.

    Patches resized likewise (bicubic, antialiased) give the same tokens, exactly when growing, in least squares when
    shrinking. Source: FlexiViT, pseudo-inverse resize.
    """
    old = (kernel.shape[2], kernel.shape[3])
    if old == tuple(patch):
        return kernel
    pixels = torch.eye(old[0] * old[1]).reshape(-1, 1, *old)
    resized = F.interpolate(pixels, size=patch, mode="bicubic", align_corners=False, antialias=True).flatten(1)
    inverse = torch.linalg.pinv(resized.double()).to(kernel.device)  # (old, new) resizes patches; this is its inverse
    return (kernel.double().flatten(2) @ inverse.T).reshape(*kernel.shape[:2], *patch).to(kernel.dtype)


def _geometric(old: int, new: int) -> Tensor:
    """What takes offsets along one side of an old window to those of a new one: float64 (2 new - 1, 2 old - 1)."""
    if old == new:
        return torch.eye(2 * old - 1, dtype=torch.float64)
    least, most, ratio = LEAST_RATIO, MOST_RATIO, 1.0
    while most - least > RATIO_ERROR:
        ratio = (least + most) / 2
        farthest = (1 - ratio ** (old - 1)) / (1 - ratio)
        least, most = (least, ratio) if farthest > new - 1 else (ratio, most)
    distances = (ratio ** torch.arange(old - 1, dtype=torch.float64)).cumsum(0)
    known = torch.cat([-distances.flip(0), torch.zeros(1, dtype=torch.float64), distances])
    wanted = torch.arange(1 - new, new, dtype=torch.float64).clamp(known[0], known[-1])
    return torch.linalg.solve(_splines(known, known), _splines(known, wanted), left=False)


def _splines(known: Tensor, wanted: Tensor) -> Tensor:
    """B-splines at the places ``wanted``, as many as there are places ``known``: float64 (wanted, known).

    Cubic, the first and last inner place no knot ("not-a-knot", as FITPACK); of lower degree through under 4 places.
    """
    degree = min(3, len(known) - 1)
    knots = torch.cat([known[:1].expand(degree + 1), known[2:-2], known[-1:].expand(degree + 1)])
    piece = torch.searchsorted(known[2:-2].contiguous(), wanted, right=True) + degree
    values = F.one_hot(piece, len(knots) - 1).double()
    for d in range(1, degree + 1):  # de Boor's recursion; terms over an empty piece are 0
        rise = (wanted[:, None] - knots[: -d - 1]) / (knots[d:-1] - knots[: -d - 1])
        fall = (knots[d + 1 :] - wanted[:, None]) / (knots[d + 1 :] - knots[1:-d])
        values = (rise * values[:, :-1]).nan_to_num(0) + (fall * values[:, 1:]).nan_to_num(0)
    return values
