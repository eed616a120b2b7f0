"""Self-attention, over packed rows (one matrix for projections, each sample its own softmax) and over (B, N)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.plan import Group, Plan

# On CPU batched GEMMs are faster than torch's fused attention: two to three times in bf16, by a tenth in fp32 with a
# float bias (by a third without gradients). Beyond this length their scores get large.
CPU_GEMM_LENGTH = 2048


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
            self.among(group, part, None if bias is None else bias[group.kind])
            for group, part in zip(plan.groups, parts, strict=True)
        ]
        return self.out(torch.cat(mixed) if len(mixed) > 1 else mixed[0], plan)

    def among(self, group: Group, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention among the tokens of each sample of one kind: (rows, 3 D) -> (rows, D)."""
        if group.index is not None and group.inverse is not None:
            qkv = Pad.apply(qkv, group.index, group.inverse)  # type: ignore[assignment]  # (B N, 3 D)
        q, k, v = qkv.view(group.samples, group.length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, C)
        mixed = attend(q, k, v, visible(bias, group.keep)).transpose(1, 2)
        mixed = mixed.reshape(group.samples * group.length, -1)  # (B N, D)
        return mixed if group.inverse is None else Unpad.apply(mixed, group.inverse)  # type: ignore[return-value]

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
        q, k, v = self.split(x)
        return self.out(attend(q, k, v, self.total(bias)).transpose(1, 2).reshape(x.shape))

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
