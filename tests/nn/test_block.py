from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multiway.nn import block
from multiway.nn.block import Block, Residual, drop_path, residual
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

    def forward(self, x: Tensor, plan: object, bias: None = None) -> Tensor:
        return x * self.factor


def test_a_block_adds_both_branches_each_with_its_own_draws() -> None:
    whole = Block(Times(2.0), Times(10.0), drop_rate=0.5)
    x = torch.ones(PLAN.rows, 1)
    assert (whole(x, PLAN) == 33).all()
    draws = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]])
    want = torch.tensor([5.0, 21.0, 1.0])[PLAN.sample][:, None]
    assert torch.equal(whole(x, PLAN, draws), want)


# --- over (B, N) ------------------------------------------------------------------------------------------------------


DRAWS = {
    "some": torch.tensor([0.1, 0.25, 0.9, 0.2]),
    "all": torch.tensor([0.3, 0.25, 0.9, 0.5]),
    "none": torch.tensor([0.1, 0.2, 0.0, 0.2]),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 2, 3, 6), (4, 6)])
def test_skipping_a_branch_is_multiplying_it_by_nothing(draw: Tensor, shape: tuple[int, ...], monkeypatch) -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    seen: list[int] = []
    branch.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    upstream, found = torch.randn(shape), []
    base = torch.randn(shape)
    for skips in (True, False):
        monkeypatch.setattr(block, "skips", lambda device, skips=skips: skips)
        x = base.clone().requires_grad_()
        out = residual(x, branch, draw, 0.25)
        found.append((out, *torch.autograd.grad((out * upstream).sum(), [x, *branch.parameters()])))
    scale = (draw >= 0.25).float() / 0.75
    torch.testing.assert_close(found[0][0], base + branch(base) * scale.view(-1, *[1] * (len(shape) - 1)))
    for skipped, multiplied in zip(*found, strict=True):
        torch.testing.assert_close(skipped, multiplied, rtol=1e-6, atol=1e-6)
    assert seen[0] == (int((draw >= 0.25).sum()) or 4) and seen[1] == 4


def test_a_branch_that_all_take_is_just_added() -> None:
    x = torch.randn(3, 2)
    for draw, rate in ((None, 0.5), (torch.zeros(3), 0.0)):
        assert torch.equal(residual(x, torch.neg, draw, rate), torch.zeros(3, 2))


def test_the_residual_stream_keeps_its_dtype_when_branches_are_narrower() -> None:
    x, draw = torch.randn(3, 2), torch.tensor([0.9, 0.1, 0.9])
    assert residual(x, lambda kept: kept.bfloat16(), draw, 0.5).dtype == torch.float32


class Adds(nn.Module):
    """A branch of ones times a factor, and of its bias."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.full_like(x, self.factor) + (0 if bias is None else bias)


def test_both_branches_are_added_each_with_its_own_draws_and_factors() -> None:
    x = torch.zeros(3, 2, 4)
    assert (Residual(Adds(1.0), Adds(10.0))(x) == 11).all()
    dropping = Residual(Adds(1.0), Adds(10.0), 0.5)
    draws = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]])
    assert dropping(x, draws)[:, 0, 0].tolist() == [2, 20, 0]
    assert dropping(x, draws, torch.tensor(3.0))[:, 0, 0].tolist() == [8, 20, 0], "the bias is attention's"
    scaled = Residual(Adds(1.0), Adds(10.0), scale=(4, 0.5))
    assert (scaled(x) == 5.5).all()
    scaled(x).sum().backward()
    assert scaled.gamma_1.grad.tolist() == [6.0] * 4 and scaled.gamma_2.grad.tolist() == [60.0] * 4
    assert not list(dropping.parameters())
