"""Biases of attention by relative position: one learned number per head and offset (Swin, BEiT)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from multiway.nn.position import relative_index, resize_bias_table


class RelativeBias(nn.Module):
    """``bias()`` -> (H, N, N) of all pairs of tokens in a (rows, columns) window, row-major, added before the softmax.

    ``prefix``: 1 = a class token comes first; its three offsets (to a patch, from a patch, to itself) are the last rows
    of ``table``: ((2 h - 1)(2 w - 1) + 3 prefix, H). Source: masked.md 1.2, vision.md 2.4.
    """

    def __init__(self, window: tuple[int, int], heads: int, prefix: Literal[0, 1] = 0) -> None:
        super().__init__()
        self.window = window
        self.prefix: Literal[0, 1] = prefix
        self.table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1) + 3 * prefix, heads))
        self._index: Tensor | None = None

    def forward(self) -> Tensor:
        """Look all pairs up."""
        if self._index is None or self._index.device != self.table.device:
            with torch.inference_mode(False):  # kept, perhaps until a step of training
                self._index = relative_index(self.window, self.prefix).flatten().to(self.table.device)
        tokens = self.window[0] * self.window[1] + self.prefix
        return self.table.index_select(0, self._index).view(tokens, tokens, -1).permute(2, 0, 1).contiguous()

    def resize(self, window: tuple[int, int], method: Literal["geometric", "bicubic"]) -> None:
        """Serve another window from now on: offsets are interpolated, those of the class token kept."""
        if window != self.window:
            table = resize_bias_table(self.table.data, self.window, window, 3 * self.prefix, method)
            self.table, self.window, self._index = nn.Parameter(table), window, None
