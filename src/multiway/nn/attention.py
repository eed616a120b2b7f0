"""Self-attention over packed rows: projections see one matrix, the softmax sees each sample's own tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.plan import Group, Plan

# On CPU in bf16 batched GEMMs are about twice as fast as torch's fused attention; beyond this their scores get large.
CPU_BF16_GEMM_LENGTH = 2048


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


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax attention, (B, H, N, C) each -> (B, H, N, C), scores scaled by 1/sqrt(C).

    ``keep``: bool, broadcast to (B, H, N, N), True = may attend; None = all. The implementation is chosen by device,
    dtype and length; visibility is honoured by all of them.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < CPU_BF16_GEMM_LENGTH:
        return attend_by_gemm(q, k, v, keep)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def attend_by_gemm(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """The plain twin of `attend`: two batched products around a softmax, which computes in fp32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if keep is not None:
        scores += torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(~keep, float("-inf"))
    return scores.softmax(-1) @ v


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

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """x: (R, D) in plan order -> (R, D)."""
        qkv = self.qkv(x, plan)  # (R, 3 D)
        parts = qkv.split([group.rows for group in plan.groups]) if len(plan.groups) > 1 else [qkv]
        mixed = [self.among(group, part) for group, part in zip(plan.groups, parts, strict=True)]
        return self.out(torch.cat(mixed) if len(mixed) > 1 else mixed[0], plan)

    def among(self, group: Group, qkv: Tensor) -> Tensor:
        """Attention among the tokens of each sample of one kind: (rows, 3 D) -> (rows, D)."""
        if group.index is not None and group.inverse is not None:
            qkv = Pad.apply(qkv, group.index, group.inverse)  # type: ignore[assignment]  # (B N, 3 D)
        q, k, v = qkv.view(group.samples, group.length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, C)
        mixed = attend(q, k, v, group.keep).transpose(1, 2).reshape(group.samples * group.length, -1)  # (B N, D)
        return mixed if group.inverse is None else Unpad.apply(mixed, group.inverse)  # type: ignore[return-value]
