from __future__ import annotations

import torch
from torch import Tensor, nn

from multiway.nn.block import Block, drop_path
from multiway.plan import make_plan

PLAN = make_plan({"pair": {"image": [2, 2, 2], "text": [1, 3, 2]}})


def test_a_dropped_sample_loses_its_branch_in_all_its_rows() -> None:
    branch = torch.randn(PLAN.rows, 4, generator=torch.Generator().manual_seed(0))
    out = drop_path(branch, torch.tensor([0.1, 0.25, 0.9]), 0.25, PLAN.sample)
    scale = torch.tensor([0.0, 4 / 3, 4 / 3])[PLAN.sample][:, None]  # a draw at the rate is kept
    torch.testing.assert_close(out, branch * scale)


def test_nothing_is_dropped_without_draws_or_rate() -> None:
    branch = torch.randn(PLAN.rows, 4)
    assert drop_path(branch, None, 0.5, PLAN.sample) is branch
    assert drop_path(branch, torch.zeros(3), 0.0, PLAN.sample) is branch


def test_the_expectation_is_the_branch() -> None:
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    out = drop_path(torch.ones(20_000, 1), draws, 0.3, torch.arange(20_000))
    assert abs(float((out == 0).float().mean()) - 0.3) < 0.01
    assert abs(float(out.mean()) - 1) < 0.015


def test_the_dtype_stays() -> None:
    branch = torch.ones(PLAN.rows, 2, dtype=torch.bfloat16)
    assert drop_path(branch, torch.rand(3), 0.5, PLAN.sample).dtype == torch.bfloat16


class Times(nn.Module):
    """Multiplies its input and ignores the plan."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, plan: object) -> Tensor:
        return x * self.factor


def test_a_block_adds_both_branches_each_with_its_own_draws() -> None:
    block = Block(Times(2.0), Times(10.0), drop_rate=0.5)
    x = torch.ones(PLAN.rows, 1)
    assert (block(x, PLAN) == 33).all()
    draws = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]])
    want = torch.tensor([5.0, 21.0, 1.0])[PLAN.sample][:, None]
    assert torch.equal(block(x, PLAN, draws), want)
