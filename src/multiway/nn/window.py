"""Attention within the windows of a map (Swin): cutting the map, shifting the windows, and Swin V2's scores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.nn import attention
from multiway.nn.linear import AnyLinear, Linear
from multiway.nn.position import relative_index

APART = -100.0
"""Added to the scores of tokens that only a shift brought together; published weights know this value, not -inf."""

MAX_LOGIT_SCALE = math.log(100)
BIAS_HIDDEN, MAX_BIAS = 512, 16.0
"""Hidden width of Swin V2's MLP of offsets, and what its biases stay below."""


class Layout(NamedTuple):
    """Where the P places of a map lie in its W windows of N, for H heads.

    ``size``: rows and columns of the map, padded to whole windows. ``split``: int64 (3, W H N), which rows of (P, 3, H)
    are q, k and v of every window and head; ``unsplit``: its inverse, (P 3 H,). ``join``: int64 (P H,), which row of
    (W, H, N) every place and head is; ``unjoin``: its inverse. ``apart``: float32 (W, 1, N, N), added to the scores of
    tokens of different regions, None = windows are not shifted.
    """

    size: tuple[int, int]
    heads: int
    split: Tensor
    unsplit: Tensor
    join: Tensor
    unjoin: Tensor
    apart: Tensor | None


def make_layout(size: tuple[int, int], window: int, shift: int, heads: int, device: torch.device) -> Layout:
    """Lay a map of (rows, columns) in windows of ``window`` x ``window``, after a roll up and left by ``shift``.

    Windows and their tokens are row-major. The regions of a shifted map are what was adjacent before the roll; padding
    belongs to them like everything else. Source: vision.md 5.1, 5.2.
    """
    rows, columns = (-(-n // window) * window for n in size)

    def windows(x: Tensor) -> Tensor:  # (rows, columns) -> (W, N)
        return x.unflatten(0, (-1, window)).unflatten(2, (-1, window)).transpose(1, 2).reshape(-1, window * window)

    def region(n: int) -> Tensor:  # along a side: 0, 1 behind its whole windows, 2 for what was rolled in
        place = torch.arange(n)
        return (place >= n - window).long() + (place >= n - shift)

    with torch.inference_mode(False):  # kept, perhaps until a step of training
        place = windows(torch.arange(rows * columns).view(rows, columns).roll((-shift, -shift), (0, 1)))
        unjoin = (place[:, None] * heads + torch.arange(heads)[:, None]).flatten().to(device)  # (W H N,)
        split = unjoin // heads * 3 * heads + unjoin % heads + torch.arange(3, device=device)[:, None] * heads
        apart = None
        if shift:
            own = windows(3 * region(rows)[:, None] + region(columns)).to(device)
            apart = APART * (own[:, None, :, None] != own[:, None, None])
        return Layout((rows, columns), heads, split, split.flatten().argsort(), unjoin.argsort(), unjoin, apart)


class Split(torch.autograd.Function):
    """A map's (B, P, 3 D) -> q, k and v of its windows, (B, W H, N, C) each: roll, windows and heads in one gather."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, split: Tensor, unsplit: Tensor, tokens: int
    ) -> tuple[Tensor, ...]:
        """Gather each; ``tokens``: N."""
        ctx.save_for_backward(unsplit)
        ctx.shape = qkv.shape
        rows = qkv.reshape(len(qkv), len(unsplit), -1)
        return tuple(rows.index_select(1, own).view(len(rows), -1, tokens, rows.shape[2]) for own in split)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Take every row's gradient from its one place: deterministic, no accumulation."""
        (unsplit,) = ctx.saved_tensors
        rows = torch.cat([grad.flatten(1, 2) for grad in grads], dim=1)
        return rows.index_select(1, unsplit).view(ctx.shape), None, None, None


class Join(torch.autograd.Function):
    """The way back: (B, W H N, C) -> (B, P, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, join: Tensor, unjoin: Tensor, heads: int) -> Tensor:  # type: ignore[override]
        """Gather."""
        ctx.save_for_backward(unjoin)
        return x.index_select(1, join).view(len(x), -1, heads * x.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Take every row's gradient from its one place."""
        (unjoin,) = ctx.saved_tensors
        return grads[0].reshape(len(grads[0]), len(unjoin), -1).index_select(1, unjoin), None, None, None


class WindowAttention(nn.Module):
    """Multi-head self-attention within the windows of a map.

    ``norm``: before it, or ``nn.Identity()``; ``qkv``: D -> 3 D with a bias; ``bias``: called without arguments for
    (H, N, N); ``cosine``: what queries and keys become first, None = scores are scaled dot products.
    """

    def __init__(
        self, norm: nn.Module, qkv: AnyLinear, out: nn.Module, bias: nn.Module, cosine: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = qkv
        self.out = out
        self.bias = bias
        self.cosine = cosine

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x: (B, rows, columns, D), of the size the layout was made for -> its shape."""
        mixed = attention.attend(*self.split(x, layout))
        mixed = mixed.reshape(len(x), len(layout.join), -1)  # (B, W H N, C)
        mixed = Join.apply(mixed, layout.join, layout.unjoin, layout.heads).unflatten(1, layout.size)  # type: ignore[union-attr]
        return self.out(mixed[:, : x.shape[1], : x.shape[2]].contiguous())

    def maps(self, x: Tensor, layout: Layout) -> Tensor:
        """How much every token (row) looks at every other (column) of its window: (B, W, H, N, N), rows sum to 1."""
        q, k, _, bias = self.split(x, layout)
        one = torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
        return attention.attend_by_gemm(q, k, one, bias).view(len(x), -1, layout.heads, *one.shape)

    def split(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and bias as `attend` takes them: (B, W H, N, C) and (W H, N, N), or where windows are
        not shifted (B W, H, N, C) and (H, N, N).
        """
        bottom, right = (whole - own for whole, own in zip(layout.size, x.shape[1:3], strict=True))
        x = self.norm(x)
        if bottom or right:  # padding is zero behind the norm
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        qkv = self.qkv(x)
        bias = self.bias()
        q, k, v = Split.apply(qkv.flatten(1, 2), layout.split, layout.unsplit, bias.shape[1])  # type: ignore[misc]
        if self.cosine is not None:
            q, k = self.cosine(q, k)
        if layout.apart is not None:
            bias = (bias + layout.apart).flatten(0, 1)
        q, k, v = (part.view(-1, len(bias), *part.shape[2:]) for part in (q, k, v))
        return q, k, v, bias


class CosineScores(nn.Module):
    """Queries and keys whose scores are their cosine times a learned scale, at most 100, per head (Swin V2).

    ``logit_scale``: its logarithm, (H, 1, 1). Source: vision.md 6.1.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at a scale of 10."""
        nn.init.constant_(self.logit_scale, math.log(10))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k: (B, W H, N, C) -> (B, W H, N, C), computed in fp32; `attend`'s 1/sqrt(C) is undone in q."""
        scale = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp() * q.shape[-1] ** 0.5
        longer = _unit(q.unflatten(1, (-1, len(scale))), scale).flatten(1, 2)
        return longer.to(q.dtype), _unit(k).to(k.dtype)


def _unit(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Vectors of length ``scale``, float32; those shorter than 1e-12 are not stretched further than they would be."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt() * scale)


class ContinuousBias(nn.Module):
    """``bias()`` -> (H, N, N) of all pairs in a ``window`` x ``window`` window, in (0, 16), from an MLP (Swin V2).

    The MLP reads offsets on a logarithmic scale, in units of the largest offset in the window it was ``trained`` with,
    so it serves other windows as it is. Computed in fp32. Source: vision.md 6.1.
    """

    def __init__(self, window: int, heads: int, trained: int) -> None:
        super().__init__()
        self.window, self.trained = window, trained
        self.fc1 = Linear(2, BIAS_HIDDEN)
        self.fc2 = Linear(BIAS_HIDDEN, heads, bias=False)
        self._lookup: tuple[Tensor, Tensor] | None = None

    def forward(self) -> Tensor:
        """All offsets through the MLP, then every pair's."""
        offsets, index = self.lookup(self.fc1.weight.device)
        with torch.autocast(offsets.device.type, enabled=False):
            bias = MAX_BIAS * self.fc2(self.fc1(offsets.to(self.fc1.weight.dtype)).relu()).float().sigmoid()
        return bias.T.contiguous().index_select(1, index).view(-1, self.window**2, self.window**2)

    def lookup(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`log_offsets`, and which of them is every pair's: int64 (N N,)."""
        if self._lookup is None or self._lookup[0].device != device:
            with torch.inference_mode(False):  # kept, perhaps until a step of training
                index = relative_index((self.window, self.window)).flatten()
                self._lookup = log_offsets(self.window, self.trained).to(device), index.to(device)
        return self._lookup

    def resize(self, window: int) -> None:
        """Serve another window from now on; nothing is interpolated."""
        self.window, self._lookup = window, None


def log_offsets(window: int, trained: int) -> Tensor:
    """Offsets of a window, down and right, row-major, as Swin V2's MLP reads them: float32 ((2 M - 1)^2, 2).

    The largest of the window ``trained`` is log2(9) / 3 = 1.057; a window of one place has the offset 0 alone.
    """
    offset = torch.arange(1.0 - window, window) * (8 / max(trained - 1, 1))
    return torch.cartesian_prod(*[offset.sign() * torch.log2(offset.abs() + 1) / 3] * 2)
