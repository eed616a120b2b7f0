from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multiway.nn import block
from multiway.nn.attention import Attention
from multiway.nn.block import Block, Residual, drop_path, of_samples, residual
from multiway.nn.multiway import Multiway
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


KINDS = {
    "image": {"image": [3, 3, 3]},
    "pair": {"image": [3, 3, 3, 3], "text": [2, 5, 1, 5]},
    "text": {"text": [4, 1]},
}
TAKEN = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)


@pytest.mark.parametrize("causal", [False, True])
def test_the_plan_of_some_samples_is_the_plan_of_a_batch_of_these(causal: bool) -> None:
    """Except that attention stays as wide as the longest sample of all."""
    plan = make_plan(KINDS, causal_text=causal)
    rows, own = of_samples(plan, TAKEN)
    kinds = {"image": {"image": [3, 3]}, "pair": {"image": [3, 3], "text": [5, 1]}, "text": {"text": [1]}}
    want = make_plan(kinds, causal_text=causal)
    assert own.segments == want.segments
    assert torch.equal(own.position, want.position) and torch.equal(own.sample, want.sample)
    assert all(torch.equal(own.starts[name], first) for name, first in want.starts.items())
    assert torch.equal(rows, TAKEN[plan.sample].nonzero()[:, 0])
    x = torch.arange(plan.rows)
    part = x[rows].split([group.rows for group in own.groups])
    whole = x.split([group.rows for group in plan.groups])
    samples = TAKEN.split([group.samples for group in plan.groups])
    for old, new, before, after, taken in zip(plan.groups, own.groups, whole, part, samples, strict=True):
        assert (new.kind, new.samples, new.length) == (old.kind, int(taken.sum()), old.length)
        if old.index is None:
            assert new.index is None
            continue
        real = torch.zeros(len(old.index), dtype=torch.bool).index_fill_(0, old.inverse, True).view(old.samples, -1)
        assert torch.equal(
            after[new.index].view(new.samples, -1)[real[taken]], before[old.index].view_as(real)[taken][real[taken]]
        )
        assert torch.equal(after[new.index][new.inverse], after)
        assert new.keep is None if old.keep is None else torch.equal(new.keep, old.keep[taken])


def test_no_kind_of_sample_is_left_without_any() -> None:
    assert of_samples(make_plan(KINDS), TAKEN & (torch.arange(9) != 8)) is None


def row_wise(width: int, out: int) -> Multiway:
    return Multiway(lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out)), ["image", "text"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_packed_samples_that_skip_a_branch_are_not_missed(causal: bool, seed: int, monkeypatch) -> None:
    """Outputs and gradients of everything, with and without computing what is dropped."""
    torch.manual_seed(seed)
    plan = make_plan(KINDS, causal_text=causal)
    whole = Block(Attention(row_wise(8, 24), row_wise(8, 8), heads=2), row_wise(8, 8), 0.4, scale=(8, 0.7))
    base, upstream, draws, found, computed = torch.randn(2, plan.rows, 8).unbind() + (torch.rand(2, 9), [], [])
    whole.ffn.register_forward_pre_hook(lambda module, given: computed.append(len(given[0])))
    for skips in (True, False):
        monkeypatch.setattr(block, "skips", lambda device, skips=skips: skips)
        x = base.clone().requires_grad_()
        out = whole(x, plan, draws)
        found.append((out, *torch.autograd.grad((out * upstream).sum(), [x, *whole.parameters()])))
    for skipped, multiplied in zip(*found, strict=True):
        torch.testing.assert_close(skipped, multiplied, rtol=1e-5, atol=1e-5)
    left = of_samples(plan, draws[1] >= 0.4)
    assert computed == [plan.rows if left is None else len(left[0]), plan.rows]


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
