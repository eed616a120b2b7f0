"""Residual blocks with stochastic depth, over packed rows and over (B, N)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from multiway.plan import Group, Plan


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
    """``x + attention(x)``, then ``x + ffn(x)``; both take (rows, plan) and own their norms.

    ``scale``: as in `Residual`.
    """

    def __init__(
        self, attention: nn.Module, ffn: nn.Module, drop_rate: float, scale: tuple[int, float] | None = None
    ) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = ffn
        self.drop_rate = drop_rate
        self.gamma_1, self.gamma_2 = factors(scale), factors(scale)

    def forward(
        self, x: Tensor, plan: Plan, draws: Tensor | None = None, bias: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """x: (R, D); draws: (2, S) of `drop_path`, for attention and FFN, or None; bias: as `Attention` takes it ->
        (R, D).
        """
        first, second = (None, None) if draws is None else draws

        def attention(kept: Tensor, plan: Plan) -> Tensor:
            return scaled(self.attention(kept, plan, bias), self.gamma_1)

        def ffn(kept: Tensor, plan: Plan) -> Tensor:
            return scaled(self.ffn(kept, plan), self.gamma_2)

        x = packed_residual(x, plan, attention, first, self.drop_rate)
        return packed_residual(x, plan, ffn, second, self.drop_rate)


def packed_residual(
    x: Tensor, plan: Plan, branch: Callable[[Tensor, Plan], Tensor], draw: Tensor | None, rate: float
) -> Tensor:
    """`residual` of packed rows: ``x + branch(x, plan)``, x (R, D); draw: float (S,).

    The plain twin is `drop_path`, which is also taken where a kind of sample would be left without any: an expert
    that nothing reaches would get no gradient instead of none.
    """
    if draw is None or rate == 0:
        return x + branch(x, plan)
    taken = draw >= rate
    part = of_samples(plan, taken) if skips(x.device) else None
    if part is None:
        return x + drop_path(branch(x, plan), draw, rate, plan.sample)
    rows, own = part
    return x.index_add(0, rows, branch(x.index_select(0, rows), own).to(x.dtype), alpha=1 / (1 - rate))


def of_samples(plan: Plan, taken: Tensor) -> tuple[Tensor, Plan] | None:
    """The rows of some samples, bool (S,), and the plan of these alone; None if a kind of sample is left with none."""
    number, stays = taken.cumsum(0) - 1, taken.index_select(0, plan.sample)
    samples = taken.split([group.samples for group in plan.groups])
    if not all(bool(some.any()) for some in samples):
        return None
    rows, row = stays.nonzero()[:, 0], stays.cumsum(0) - 1
    groups = [
        _of_group(group, *own)
        for group, *own in zip(plan.groups, samples, stays.split([group.rows for group in plan.groups]), strict=True)
    ]
    first = stays & (plan.position == 0)  # where sequences begin
    sizes = [segment.rows for segment in plan.segments]
    segments = [
        segment._replace(samples=int(begun.sum()), rows=int(some.sum()))
        for segment, some, begun in zip(plan.segments, stays.split(sizes), first.split(sizes), strict=True)
    ]
    starts = {name: row[begin[stays[begin]]] for name, begin in plan.starts.items()}
    return rows, Plan(tuple(segments), tuple(groups), plan.position[rows], number[plan.sample[rows]], starts)


def _of_group(group: Group, taken: Tensor, stays: Tensor) -> Group:
    """A group of the samples taken, bool (B,), whose rows stay, bool (rows,)."""
    keep = None if group.keep is None else group.keep[taken]
    count, rows = int(taken.sum()), int(stays.sum())
    if group.index is None or group.inverse is None:
        return dataclasses.replace(group, samples=count, rows=rows, keep=keep)
    index = (stays.cumsum(0) - 1)[group.index.view(-1, group.length)[taken]].clamp_(min=0).flatten()  # 0 at padding
    place, number = group.inverse[stays], taken.cumsum(0) - 1
    inverse = number[place // group.length] * group.length + place % group.length
    return Group(group.kind, rows, count, group.length, index, inverse, keep)


def factors(scale: tuple[int, float] | None) -> nn.Parameter | None:
    """LayerScale's factors, (width,) of one value, or None."""
    return None if scale is None else nn.Parameter(torch.full(scale[:1], scale[1]))


def scaled(branch: Tensor, factor: nn.Parameter | None) -> Tensor:
    """A branch (..., D) times its factors (D,), if it has any."""
    return branch if factor is None else branch * factor


def skips(device: torch.device) -> bool:
    """Whether branches are computed for the samples that take them alone."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def residual(x: Tensor, branch: Callable[[Tensor], Tensor], draw: Tensor | None, rate: float) -> Tensor:
    """``x + branch(x)``; samples whose draw is below ``rate`` skip the branch, the others' is scaled by 1/(1-rate).

    x: (B, ...); draw: float (B,), uniform in [0, 1), drawn when the batch was made; None = all take it. On a CPU the
    branch is computed for the samples that take it alone; elsewhere finding them would cost a wait for the device.
    Source: stochastic depth as in BEiT and Swin, per sample.
    """
    if draw is None or rate == 0:
        return x + branch(x)
    taken = draw >= rate
    if skips(x.device) and bool(taken.any()):
        rows = taken.nonzero()[:, 0]
        return x.index_add(0, rows, branch(x.index_select(0, rows)).to(x.dtype), alpha=1 / (1 - rate))
    scale = taken.to(x.dtype) / (1 - rate)
    return x + branch(x) * scale.view(-1, *[1] * (x.ndim - 1))


class Residual(nn.Module):
    """``x + attention(x)``, then ``x + ffn(x)``, for x (B, ...); where norms are is the branches' business.

    ``scale``: width and first value of LayerScale's factors on every channel of both branches (CaiT, BEiT), None = no
    factors; ``drop_rate``: of stochastic depth.
    """

    def __init__(
        self, attention: nn.Module, ffn: nn.Module, drop_rate: float = 0.0, scale: tuple[int, float] | None = None
    ) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = ffn
        self.drop_rate = drop_rate
        self.gamma_1, self.gamma_2 = factors(scale), factors(scale)

    def forward(self, x: Tensor, draws: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x: (B, ...); draws: (2, B) of `residual`, of attention and FFN, or None; bias: of attention -> x's shape."""
        first, second = (None, None) if draws is None else draws

        def attention(kept: Tensor) -> Tensor:
            return scaled(self.attention(kept, bias), self.gamma_1)

        def ffn(kept: Tensor) -> Tensor:
            return scaled(self.ffn(kept), self.gamma_2)

        x = residual(x, attention, first, self.drop_rate)
        return residual(x, ffn, second, self.drop_rate)
