"""Learned positions, and their transfer to another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], extra: int) -> Tensor:
    """Interpolate a position table (extra + rows * columns, D) from the ``old`` to the ``new`` (rows, columns) grid.

    The first ``extra`` rows (class token and the like) are kept. Source: BEiT, bicubic, align_corners=False.
    Raises ValueError when the table does not belong to the old grid.
    """
    if len(table) != extra + old[0] * old[1]:
        raise ValueError(f"a table of {len(table)} rows is not {extra} extra rows and a grid of {old[0]}x{old[1]}")
    if old == new:
        return table
    grid = table[extra:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
    return torch.cat([table[:extra], grid])
