from __future__ import annotations

import pytest
import torch
from torch import nn

from multiway.nn.multiway import Multiway
from multiway.plan import make_plan

KINDS = {"image": {"image": [3, 3]}, "pair": {"image": [3], "text": [2]}, "text": {"text": [4, 1]}}
EXPERTS = {
    ("shared",): ["shared"] * 16,
    ("image", "text"): ["image"] * 9 + ["text"] * 7,
    ("image", "text", "pair"): ["image"] * 6 + ["pair"] * 5 + ["text"] * 5,
}


def build(experts: tuple[str, ...]) -> Multiway:
    torch.manual_seed(0)
    return Multiway(lambda: nn.Linear(4, 3), experts)


@pytest.mark.parametrize("experts", EXPERTS, ids="+".join)
def test_every_row_goes_through_its_own_expert(experts: tuple[str, ...]) -> None:
    multiway, plan = build(experts), make_plan(KINDS)
    x = torch.randn(plan.rows, 4, generator=torch.Generator().manual_seed(1))
    want = torch.stack([multiway.experts[name](row) for name, row in zip(EXPERTS[experts], x, strict=True)])
    torch.testing.assert_close(multiway(x, plan), want)


def test_experts_start_different() -> None:
    multiway = build(("image", "text"))
    assert not torch.equal(multiway.experts["image"].weight, multiway.experts["text"].weight)


def test_an_expert_without_rows_is_left_alone() -> None:
    multiway, plan = build(("image", "text", "pair")), make_plan({"text": {"text": [2, 1]}})
    multiway(torch.ones(3, 4), plan).sum().backward()
    used = {name: expert.weight.grad is not None for name, expert in multiway.experts.items()}
    assert used == {"image": False, "text": True, "pair": False}
