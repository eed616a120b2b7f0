"""The pre-norm residual block with stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from multiway.plan import Plan


def drop_path(branch: Tensor, draw: Tensor | None, rate: float, sample: Tensor) -> Tensor:
    """Drop a residual branch (R, D) for the samples whose draw is below ``rate``, scaling the others by 1/(1-rate).

    ``draw``: float (S,), uniform in [0, 1), one per sample, drawn when the batch was made; None = keep all.
    ``sample``: int64 (R,), the sample of each row. Source: stochastic depth as in BEiT, per sample.
    """
    if draw is None or rate == 0:
        return branch
    scale = (draw >= rate).to(branch.dtype) / (1 - rate)
    return branch * scale.index_select(0, sample)[:, None]


class Block(nn.Module):
    """``x + attention(x)``, then ``x + ffn(x)``; both take (rows, plan) and own their norms."""

    def __init__(self, attention: nn.Module, ffn: nn.Module, drop_rate: float) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = ffn
        self.drop_rate = drop_rate

    def forward(self, x: Tensor, plan: Plan, draws: Tensor | None = None) -> Tensor:
        """x: (R, D); draws: (2, S) of `drop_path`, for attention and FFN, or None -> (R, D)."""
        first, second = (None, None) if draws is None else draws
        x = x + drop_path(self.attention(x, plan), first, self.drop_rate, plan.sample)
        return x + drop_path(self.ffn(x, plan), second, self.drop_rate, plan.sample)
