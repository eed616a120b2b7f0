"""Logits made part by part give the same loss and gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multiway.objectives import masked
from multiway.objectives.masked import masked_cross_entropy

ROWS, WIDTH, CLASSES = 23, 6, 50


@pytest.fixture
def given() -> tuple[Tensor, torch.nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, WIDTH, requires_grad=True)
    return x, torch.nn.Linear(WIDTH, CLASSES), torch.randperm(40)[:ROWS], torch.randint(0, CLASSES, (ROWS,))


def test_it_is_the_cross_entropy_at_hidden_places(given: tuple[Tensor, torch.nn.Linear, Tensor, Tensor]) -> None:
    x, head, hidden, target = given
    losses, hits = masked_cross_entropy(lambda places: head(x[places]), hidden, target, CLASSES)
    scores = head(x[hidden])
    torch.testing.assert_close(losses, scores.logsumexp(-1) - scores[torch.arange(ROWS), target])
    assert torch.equal(hits, (scores.argmax(-1) == target).float())


@pytest.mark.parametrize("step", [1, 7, 22, 23])
def test_parts_are_the_whole(
    step: int, given: tuple[Tensor, torch.nn.Linear, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, head, hidden, target = given
    most: list[int] = []

    def logits(places: Tensor) -> Tensor:
        most.append(len(places))
        return head(x[places])

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        losses, hits = masked_cross_entropy(logits, hidden, target, CLASSES)
        grads = torch.autograd.grad((losses * torch.arange(ROWS)).sum(), (x, *head.parameters()))
        return losses.detach(), hits, list(grads)

    whole = run()
    monkeypatch.setattr(masked, "LOGITS_BYTES", 4 * CLASSES * step)
    most.clear()
    parts = run()
    assert max(most) == step
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_one_part_of_the_logits_is_kept_at_a_time(
    given: tuple[Tensor, torch.nn.Linear, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, head, hidden, target = given

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda y: sizes.append(y.numel()) or y, lambda y: y):
            masked_cross_entropy(lambda places: head(x[places]), hidden, target, CLASSES)
        return max(sizes)

    assert kept() == ROWS * CLASSES
    monkeypatch.setattr(masked, "LOGITS_BYTES", 4 * CLASSES * 5)
    assert kept() < 5 * CLASSES
