"""Contrastive losses against their formulas, and split over ranks: which are those of one process, which are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.objectives.contrastive import Negatives, pairwise_sigmoid, symmetric_cross_entropy

PAIRS, WIDTH = 12, 6


def features() -> list[Tensor]:
    """Unit vectors of both views, a factor and a bias; leaves."""
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=1) for _ in range(2))
    return [x.requires_grad_() for x in (a, F.normalize(b + a, dim=1), torch.tensor([5.0]), torch.tensor([-2.0]))]


def alone(x: Tensor) -> Tensor:
    return x


def gather_of(parts: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """What a rank gathers of one view: with gradient to all ranks if it gives its own with one."""
    return lambda x: torch.cat([part if x.requires_grad else part.detach() for part in parts])


def over_ranks(world: int, a: Tensor, b: Tensor, loss: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of what every rank of ``world`` computes of its share."""
    views = a.chunk(world), b.chunk(world)
    total = torch.zeros(())
    for rank, (own, other) in enumerate(zip(*views, strict=True)):

        def gather(x: Tensor, own: Tensor = own) -> Tensor:
            return gather_of(list(views[0 if torch.equal(x, own) else 1]))(x)

        total = total + loss(own, other, gather, rank)[0].sum()
    return total


def test_the_loss_is_the_cross_entropy_of_finding_the_partner_both_ways() -> None:
    a, b, scale, _ = features()
    losses, hits = symmetric_cross_entropy(a, b, scale, alone, 0)
    scores = scale * a @ b.T
    both = [(s.logsumexp(1) - s.diagonal()) for s in (scores, scores.T)]
    torch.testing.assert_close(losses, (both[0] + both[1]) / 2)
    found = [(s.argmax(1) == torch.arange(PAIRS)).float() for s in (scores, scores.T)]
    assert torch.equal(hits, (found[0] + found[1]) / 2)
    assert 0 < hits.mean() < 1


@pytest.mark.parametrize("negatives", ["gathered", "detached"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_gathered_losses_and_gradients_are_those_of_one_process(world: int, negatives: Negatives) -> None:
    a, b, scale, _ = features()
    want = symmetric_cross_entropy(a, b, scale, alone, 0)[0].sum()
    expected = torch.autograd.grad(want, (a, b, scale))
    got = over_ranks(
        world, a, b, lambda x, y, gather, rank: symmetric_cross_entropy(x, y, scale, gather, rank, negatives)
    )
    torch.testing.assert_close(got, want)
    for g, e in zip(torch.autograd.grad(got, (a, b, scale)), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


def test_detached_negatives_send_no_gradient_to_other_ranks() -> None:
    a, b, scale, _ = features()
    shares = [x.detach().clone().requires_grad_() for x in (*a.chunk(2), *b.chunk(2))]

    def gather(x: Tensor) -> Tensor:
        return gather_of(shares[:2] if torch.equal(x, shares[0]) else shares[2:])(x)

    symmetric_cross_entropy(shares[0], shares[2], scale, gather, 0, "detached")[0].sum().backward()
    assert shares[0].grad is not None and shares[2].grad is not None
    assert shares[1].grad is None and shares[3].grad is None


def test_local_negatives_are_the_ranks_own() -> None:
    a, b, scale, _ = features()
    got = over_ranks(2, a, b, lambda x, y, gather, rank: symmetric_cross_entropy(x, y, scale, gather, rank, "local"))
    halves = [symmetric_cross_entropy(x, y, scale, alone, 0)[0].sum() for x, y in zip(a.chunk(2), b.chunk(2))]
    torch.testing.assert_close(got, halves[0] + halves[1])
    assert got < symmetric_cross_entropy(a, b, scale, alone, 0)[0].sum()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_sigmoid_loss_judges_every_pair(world: int) -> None:
    a, b, scale, bias = features()
    signs = 2 * torch.eye(PAIRS) - 1
    want = -F.logsigmoid(signs * (scale * a @ b.T + bias)).sum()
    expected = torch.autograd.grad(want, (a, b, scale, bias))
    got = over_ranks(world, a, b, lambda x, y, gather, rank: pairwise_sigmoid(x, y, scale, bias, gather, rank))
    torch.testing.assert_close(got, want)
    for g, e in zip(torch.autograd.grad(got, (a, b, scale, bias)), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


def test_a_sigmoid_hit_is_the_partner_scoring_highest() -> None:
    a, b, scale, bias = features()
    _, hits = pairwise_sigmoid(a, b, scale, bias, alone, 0)
    assert torch.equal(hits, ((a @ b.T).argmax(1) == torch.arange(PAIRS)).float())
    assert 0 < hits.mean() < 1


def test_the_losses_are_computed_in_fp32_under_autocast() -> None:
    a, b, scale, bias = (x.detach() for x in features())
    exact = symmetric_cross_entropy(a, b, scale, alone, 0)[0], pairwise_sigmoid(a, b, scale, bias, alone, 0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = symmetric_cross_entropy(a, b, scale, alone, 0)[0], pairwise_sigmoid(a, b, scale, bias, alone, 0)[0]
    assert all(torch.equal(x, y) for x, y in zip(exact, under, strict=True))
