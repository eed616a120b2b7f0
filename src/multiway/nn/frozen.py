"""Networks inside an objective that are used and never trained: teachers and tokenizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network, in evaluation mode, whose weights get no gradients; answers every call and name as it does.

    It moves to devices with the objective it is put in, and is otherwise no part of it: not trained, averaged, sharded
    or stored in checkpoints.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.held = (network.eval().requires_grad_(False),)  # a tuple hides it from torch's lists of parts

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """What the network makes of them."""
        return self.held[0](*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the network."""
        return getattr(self.__dict__["held"][0], name)

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        self.held[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)
