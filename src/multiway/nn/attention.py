"""Self-attention, over packed rows (one matrix for projections, each sample its own softmax) and over (B, N)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multiway.nn.linear import mkl_is_slow, product
from multiway.plan import Group, Plan

# On CPU batched GEMMs are faster than torch's fused attention: two to three times in bf16, by a tenth in fp32 with a
# float bias (by a third without gradients). Beyond this length their scores get large.
CPU_GEMM_LENGTH = 2048

ONEDNN_LENGTH = 240
"""From this length on, a product of one head in fp32 is worth a call of oneDNN, where that is the faster one."""


class Pad(torch.autograd.Function):
    """Rows (R, ...) -> places (P, ...) of a padded layout; a place of padding repeats row 0 and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        """Gather; the backward is the inverse gather, exact because padding is never attended to."""
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Take every row's gradient from its one place: deterministic, no accumulation."""
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class Unpad(torch.autograd.Function):
    """Places (P, ...) -> rows (R, ...): drops the padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        """Gather every row from its place."""
        ctx.save_for_backward(inverse)
        ctx.places = len(x)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Write every row's gradient to its one place, zero at padding."""
        (inverse,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, inverse, grad), None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention, (B, H, N, C) each -> (B, H, N, C), scores scaled by 1/sqrt(C).

    ``bias``: broadcast to (B, H, N, N); bool: True = may attend; float: added to the scores; None = nothing. The
    implementation is chosen by device, dtype and length; visibility is honoured by all of them.
    """
    added = bias is not None and bias.is_floating_point()
    if q.device.type == "cpu" and (added or q.dtype == torch.bfloat16) and q.shape[2] < CPU_GEMM_LENGTH:
        return attend_by_gemm(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias is None else as_mask(bias, q.dtype))


def as_mask(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias as fused attention takes it: bool, or float of the queries' dtype."""
    return bias if bias.dtype == torch.bool else bias.to(dtype)


def attend_by_gemm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The plain twin of `attend`: two batched products around a softmax, which computes in fp32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill_(~bias, float("-inf"))
        scores = scores + bias.to(q.dtype)
    return scores.softmax(-1) @ v


def visible(bias: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """A float bias where a query may attend and -inf elsewhere; of one that is None, the other."""
    if bias is None or keep is None:
        return keep if bias is None else bias
    return torch.where(keep, bias, float("-inf"))


def heads_by_onednn(x: Tensor, length: int) -> bool:
    """Whether products of heads are oneDNN's: in fp32, where MKL is slow and they are worth the calls."""
    return x.dtype == torch.float32 and length >= ONEDNN_LENGTH and mkl_is_slow()


def products_pay(x: Tensor, length: int, bias: Tensor | None) -> bool:
    """Whether `HeadProducts` is the fastest attention for rows x of samples of at most ``length`` tokens."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    added = bias is not None and bias.is_floating_point()
    return heads_by_onednn(x, length) or ((added or x.dtype == torch.bfloat16) and length < CPU_GEMM_LENGTH)


def head_places(group: Group, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where vectors of heads are: for every place of q, k and v (3, B, H, N) its source among the rows' (R, 3, H), and
    for the rows' (R, H) their places in (B, H, N); both flat.
    """
    row, place = group.index, group.inverse
    if row is None or place is None:
        row = place = torch.arange(group.rows, device=device)
    head = torch.arange(heads, device=device)
    part = torch.arange(3, device=device)[:, None, None, None]
    source = (row.view(-1, 1, group.length) * 3 + part) * heads + head[:, None]
    sample, position = place[:, None] // group.length, place[:, None] % group.length
    return source.flatten(), ((sample * heads + head) * group.length + position).flatten()


class HeadProducts(torch.autograd.Function):
    """Self-attention by products of heads, with one gather from rows to heads before them and one back after them.

    All heads at once, and their probabilities are kept; or by oneDNN head by head, so that scores never leave the
    processor's cache, and they are computed again in the backward. The plain twin is `attend_by_gemm` between `Pad`
    and `Unpad`.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, group: Group, heads: int, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        """qkv: (R, 3 D), the rows of a group; bias: as `attend` takes it -> (R, D)."""
        size, width = (group.samples, heads, group.length), qkv.shape[1] // (3 * heads)
        source, place = head_places(group, heads, qkv.device)
        q, k, v = qkv.reshape(-1, width).index_select(0, source).view(3, *size, width)
        q.mul_(width**-0.5)
        whole = None if bias is None else bias.expand(*size, group.length)
        kept, mixed, onednn = None, torch.empty_like(q), heads_by_onednn(qkv, group.length)
        for head in np.ndindex(size[:2]) if onednn else [...]:
            p = _probabilities(q, k, whole, head)
            _times(p, v[head], mixed[head])
            kept = None if onednn else p
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(q, k, v, whole, place, kept)
        return mixed.view(-1, width).index_select(0, place).view(len(qkv), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of qkv, and of the bias if that needs one."""
        q, k, v, bias, place, kept = ctx.saved_tensors
        *size, width = q.shape
        g = q.new_zeros(math.prod(size), width).index_copy_(0, place, grad.reshape(-1, width)).view_as(q)
        vectors = q.new_empty(3, *q.shape)
        of_bias = q.new_empty(*size, size[2]) if ctx.needs_input_grad[3] else None
        for head in np.ndindex(*size[:2]) if kept is None else [...]:
            p = _probabilities(q, k, bias, head) if kept is None else kept
            of_p = _times(g[head], v[head].mT)
            into = of_p if of_bias is None else of_bias[head]
            scores = torch.ops.aten._softmax_backward_data.out(of_p, p, -1, p.dtype, grad_input=into)
            for part, (a, b) in enumerate(((scores, k), (scores.mT, q), (p.mT, g))):
                _times(a, b[head], vectors[part][head])
        vectors[0].mul_(width**-0.5)
        back = place.view(-1, 1, size[1]) + torch.arange(3, device=q.device)[:, None] * (q.numel() // width)
        rows = vectors.view(-1, width).index_select(0, back.flatten()).view(len(grad), -1)
        return rows, None, None, None if of_bias is None else of_bias.sum_to_size(ctx.bias[0]).to(ctx.bias[1])


def _times(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """``a @ b``, written ``into`` a tensor if one is given: of all heads (B, H, ...), or of one by oneDNN, which would
    copy a first factor that is transposed.
    """
    if a.ndim > 2:
        return a @ b if into is None else torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=into.flatten(0, 1))
    found = product(a, b.mT) if a.is_contiguous() else product(b.mT, a).mT
    return found if into is None else into.copy_(found)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, head: Any) -> Tensor:
    """Of one head or, with ..., of all: q, k: (B, H, N, C); bias: (B, H, N, N) or None."""
    scores = _times(q[head], k[head].mT)
    if bias is not None:
        own = bias[head]
        scores = scores.masked_fill_(~own, -math.inf) if own.dtype == torch.bool else scores.add_(own)
    return torch.softmax(scores, -1, out=scores)


def mix(qkv: Tensor, group: Group, heads: int, bias: Tensor | None) -> Tensor:
    """Attention among the tokens of each sample of a group: rows (R, 3 D) -> (R, D); bias: as `attend` takes it."""
    if products_pay(qkv, group.length, bias):
        return HeadProducts.apply(qkv, group, heads, bias)  # type: ignore[return-value]
    if group.index is not None and group.inverse is not None:
        qkv = Pad.apply(qkv, group.index, group.inverse)  # type: ignore[assignment]  # (B N, 3 D)
    q, k, v = qkv.view(group.samples, group.length, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, C)
    mixed = attend(q, k, v, bias).transpose(1, 2).reshape(group.samples * group.length, -1)  # (B N, D)
    return mixed if group.inverse is None else Unpad.apply(mixed, group.inverse)  # type: ignore[return-value]


class Cache:
    """Keys and values of tokens that later ones attend to: a buffer (B, H, places, C) of each per layer.

    ``filled``: places that stay. What is put behind them is seen once, and overwritten by what comes next.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.filled = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, N, C) of a layer behind the filled places; return those up to and with them."""
        if layer not in self.layers:
            size = (*k.shape[:2], self.places, k.shape[3])
            self.layers[layer] = k.new_empty(size), v.new_empty(size)
        start, stop = self.filled, self.filled + k.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]

    def reorder(self, start: int, parents: Tensor) -> None:
        """Give every beam the past of its parent: int64 (B, K) of K beams, which take turns from place ``start`` on."""
        index = parents[:, None, None, :, None]
        for part in (part[:, :, start : self.filled] for both in self.layers.values() for part in both):
            part.copy_(part.unflatten(2, (-1, parents.shape[1])).take_along_dim(index, 3).flatten(2, 3))


class Attention(nn.Module):
    """Multi-head self-attention: ``qkv`` (R, D) -> (R, 3 D), attention within each sample, ``out`` (R, D) -> (R, D).

    ``qkv`` and ``out`` take (rows, plan), as `Multiway` does; norms belong to them.
    Every row of 3 D holds q, k and v, each head by head.
    """

    def __init__(self, qkv: nn.Module, out: nn.Module, heads: int) -> None:
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.heads = heads

    def forward(self, x: Tensor, plan: Plan, bias: Mapping[str, Tensor] | None = None) -> Tensor:
        """x: (R, D) in plan order; bias: by kind of sample, float (H, N, N) added to the scores, None = nothing ->
        (R, D).
        """
        qkv = self.qkv(x, plan)  # (R, 3 D)
        parts = qkv.split([group.rows for group in plan.groups]) if len(plan.groups) > 1 else [qkv]
        mixed = [
            mix(part, group, self.heads, visible(None if bias is None else bias[group.kind], group.keep))
            for group, part in zip(plan.groups, parts, strict=True)
        ]
        return self.out(torch.cat(mixed) if len(mixed) > 1 else mixed[0], plan)

    def extend(self, x: Tensor, plan: Plan, cache: Cache, layer: int, keep: Tensor | None) -> Tensor:
        """As forward, without gradient, for new tokens that also see those in the cache, where theirs are put.

        ``plan``: of N new tokens per sample; ``keep``: bool, broadcast to (B, H, N, filled + N), True = may attend,
        None = all do.
        """
        group = plan.groups[0]
        q, k, v = self.qkv(x, plan).view(group.samples, group.length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(q, *cache.put(layer, k, v), keep).transpose(1, 2)  # (B, N, H, C)
        return self.out(mixed.reshape(x.shape), plan)


class SelfAttention(nn.Module):
    """Multi-head self-attention of every token with all of its sequence: (B, N, D) -> (B, N, D).

    ``qkv``: (..., D) -> (..., 3 D), q, k and v head by head; ``out``: (..., D) -> (..., D); norms belong to them.
    ``bias``: this layer's own, called without arguments for (H, N, N), or None.
    """

    def __init__(self, qkv: nn.Module, out: nn.Module, heads: int, bias: nn.Module | None = None) -> None:
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.heads = heads
        self.bias = bias

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (B, N, D); bias: as in `attend`, added to the layer's own, None = nothing -> (B, N, D)."""
        group = Group("", len(x) * x.shape[1], len(x), x.shape[1], None, None, None)
        return self.out(mix(self.qkv(x).flatten(0, 1), group, self.heads, self.total(bias)).view(x.shape))

    def maps(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """How much every token (row) looks at every other (column): (B, H, N, N), rows sum to 1."""
        q, k, _ = self.split(x)
        return attend_by_gemm(q, k, torch.eye(x.shape[1], dtype=q.dtype, device=q.device), self.total(bias))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B, N, D) -> (B, H, N, C) each."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def total(self, bias: Tensor | None) -> Tensor | None:
        """The given bias and the layer's own."""
        if self.bias is None or bias is None:
            return bias if self.bias is None else self.bias()
        return visible(self.bias(), bias) if bias.dtype == torch.bool else self.bias() + bias
