"""The Multiway wrapper: one copy of a module per expert, each on its own contiguous rows (BEiT-3, figure 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from multiway.plan import Plan


class Multiway(nn.Module):
    """A row-wise module with one copy per expert.

    ``build``: makes one copy; ``experts``: their names. Rows go to the expert of their kind of sample when there is
    one (``"pair"``: the vision-language expert), else to that of their modality, else to ``"shared"``; so
    ``Multiway(build, ["shared"])`` is the plain module and ``["image", "text"]`` one per modality.
    """

    def __init__(self, build: Callable[[], nn.Module], experts: Sequence[str]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({name: build() for name in experts})

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """x: (R, D) in plan order -> (R, D'), every row by its own expert."""
        runs = plan.runs(tuple(self.experts))
        if len(runs) == 1:
            return self.experts[runs[0][0]](x)
        parts = x.split([rows for _, rows in runs])
        return torch.cat([self.experts[name](part) for (name, _), part in zip(runs, parts, strict=True)])
