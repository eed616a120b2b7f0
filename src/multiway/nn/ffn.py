"""The row-wise halves of a Transformer block, with the normalisation that belongs to each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from multiway.nn.linear import lean


class NormLinear(nn.Module):
    """LayerNorm, then a linear map: ``linear(norm(x))``; pass ``nn.Identity()`` as ``norm`` for none."""

    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, D) -> (R, D')."""
        return lean(self.norm, self.norm.parameters(), self.linear, x)


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
        hidden = lean(self.norm, self.norm.parameters(), self.fc1, x)
        return lean(self.activate, self.inner.parameters(), self.fc2, hidden)

    def activate(self, hidden: Tensor) -> Tensor:
        """What lies between the two linear maps: (R, hidden) -> (R, hidden)."""
        return self.inner(F.gelu(hidden))
