"""The row-wise halves of a Transformer block, with the normalisation that belongs to each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class NormLinear(nn.Module):
    """LayerNorm, then a linear map: ``linear(norm(x))``; pass ``nn.Identity()`` as ``norm`` for none."""

    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, D) -> (R, D')."""
        return self.linear(self.norm(x))


class FeedForward(nn.Module):
    """``fc2(inner(GELU(fc1(norm(x)))))``: GELU is the exact (erf) one, computed in fp32 inside its kernel.

    ``inner`` is the sub-LayerNorm over the hidden width (Magneto), or ``nn.Identity()``.
    """

    def __init__(self, norm: nn.Module, fc1: nn.Linear, inner: nn.Module, fc2: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.fc1 = fc1
        self.inner = inner
        self.fc2 = fc2

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, D) -> (R, D)."""
        return self.fc2(self.inner(F.gelu(self.fc1(self.norm(x)))))
