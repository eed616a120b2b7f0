"""Activations between the two linear maps of an FFN; which one is part of what the weights mean."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""The exact GELU (erf), its approximation by tanh (SigLIP), and x sigmoid(1.702 x) (OpenAI's CLIP)."""

STEEPNESS = 1.702


class QuickGELU(torch.autograd.Function):
    """``x sigmoid(1.702 x)``, which is SiLU at another scale: its kernels, and nothing kept but x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """x: any shape -> the same."""
        ctx.save_for_backward(x)
        return F.silu(x * STEEPNESS).mul_(1 / STEEPNESS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The factor of SiLU's scale and that of its argument cancel."""
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0], x * STEEPNESS)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation: any shape -> the same."""
    if activation == "quick_gelu":
        return QuickGELU.apply(x)  # type: ignore[return-value]
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
