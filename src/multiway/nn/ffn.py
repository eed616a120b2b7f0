"""The row-wise halves of a Transformer block, with the normalisation that belongs to each."""

from __future__ import annotations

from torch import Tensor, nn

from multiway.nn.activation import Activation, activate
from multiway.nn.linear import AnyLinear, lean


class NormLinear(nn.Module):
    """LayerNorm, then a linear map: ``linear(norm(x))``; pass ``nn.Identity()`` as ``norm`` for none."""

    def __init__(self, norm: nn.Module, linear: AnyLinear) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, D) -> (R, D')."""
        return self.linear(self.norm(x))


class FeedForward(nn.Module):
    """``fc2(inner(GELU(fc1(norm(x)))))``: GELU is the exact (erf) one, computed in fp32 inside its kernel.

    ``inner`` is the sub-LayerNorm over the hidden width (Magneto), or ``nn.Identity()``; ``activation``: what stands
    for GELU.
    """

    def __init__(
        self, norm: nn.Module, fc1: nn.Linear, inner: nn.Module, fc2: nn.Linear, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.norm = norm
        self.fc1 = fc1
        self.inner = inner
        self.fc2 = fc2
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, D) -> (R, D)."""
        x = self.fc1(self.norm(x))
        if self.activation == "gelu":
            return lean(x, self.inner, self.fc2)
        return self.fc2(self.inner(activate(x, self.activation)))
