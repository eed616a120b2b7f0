"""Biases of attention by relative position: one learned number per head and offset (Swin, BEiT)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.nn.position import bias_rows, joint_index, relative_index, resize_bias_table
from multiway.plan import Plan


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


class JointBias(nn.Module):
    """Biases of pictures, of texts and of both together, of all layers, from one ``table`` (A, layers * H).

    ``window``: rows and columns of patches, behind a class token; ``longest``: tokens of a text at most. The rows are
    those of `joint_index`.
    """

    def __init__(self, window: tuple[int, int], layers: int, heads: int, longest: int) -> None:
        super().__init__()
        self.window, self.layers, self.heads, self.longest = window, layers, heads, longest
        self.table = nn.Parameter(torch.zeros(bias_rows(window, 1) + 2 * longest + 2, layers * heads))
        self._index: Tensor | None = None

    def forward(self, plan: Plan) -> list[dict[str, Tensor]]:
        """Of every layer, by kind of sample: (H, N, N), N the length of the plan's sequences; pictures come first."""
        if self._index is None or self._index.device != self.table.device:
            with torch.inference_mode(False):  # kept, perhaps until a step of training
                self._index = joint_index(self.window, self.longest).to(self.table.device)
        biases = {}
        for group in plan.groups:
            first = len(self._index) - self.longest if group.kind == "text" else 0
            index = self._index[first : first + group.length, first : first + group.length]
            every = F.embedding(index, self.table).permute(2, 0, 1).contiguous()  # its backward adds in a fixed order
            biases[group.kind] = every.view(self.layers, self.heads, *index.shape)
        return [{kind: every[layer] for kind, every in biases.items()} for layer in range(self.layers)]

    def resize(self, window: tuple[int, int]) -> None:
        """Serve another window from now on: offsets of patches are interpolated geometrically, the rest is kept."""
        if window != self.window:
            kept = len(self.table) - bias_rows(self.window)
            table = resize_bias_table(self.table.data, self.window, window, kept)
            self.table, self.window, self._index = nn.Parameter(table), window, None
