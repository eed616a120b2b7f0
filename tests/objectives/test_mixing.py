"""Erasing and mixing on a batch against loops over its pictures, and the loss against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.objectives.mixing import erase, mix, soft_cross_entropy, soft_targets

HEIGHT, WIDTH, CLASSES = 9, 7, 5
NONE = [0, 0, 0, 0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def pasted(x: Tensor, source: Tensor, box: list[int]) -> Tensor:
    top, left, height, width = box
    x = x.clone()
    x[:, top : top + height, left : left + width] = source[:, top : top + height, left : left + width]
    return x


def test_erased_boxes_hold_their_noise_and_nothing_else_changes(x: Tensor) -> None:
    boxes = [[1, 2, 3, 4], NONE, [0, 0, 8, 6], [8, 6, 1, 1]]
    noise = torch.randn(3 * sum(height * width for *_, height, width in boxes))
    found = erase(x, torch.tensor(boxes), noise)
    before = 0
    for i, (top, left, height, width) in enumerate(boxes):
        own = noise[before : before + 3 * height * width].view(3, height, width)
        expected = x[i].clone()
        expected[:, top : top + height, left : left + width] = own
        assert torch.equal(found[i], expected)
        before += own.numel()


def test_no_noise_is_needed_where_nothing_is_erased(x: Tensor) -> None:
    assert torch.equal(erase(x, torch.tensor([NONE] * 4), torch.empty(0)), x)


def test_mixup_blends_neighbours(x: Tensor) -> None:
    found = mix(x, torch.tensor([0.3, 0.3, 0.9, 0.9]), torch.tensor([NONE] * 4))
    for i, (other, share) in enumerate([(1, 0.3), (0, 0.3), (3, 0.9), (2, 0.9)]):
        torch.testing.assert_close(found[i], share * x[i] + (1 - share) * x[other])


def test_cutmix_pastes_the_neighbour_into_the_box_and_the_share_is_what_is_left(x: Tensor) -> None:
    box = [2, 1, 4, 5]
    share = torch.tensor([1 - 20 / (HEIGHT * WIDTH)] * 2 + [1.0, 1.0])
    found = mix(x, share, torch.tensor([box, box, NONE, NONE]))
    assert torch.equal(found, torch.stack([pasted(x[0], x[1], box), pasted(x[1], x[0], box), x[2], x[3]]))
    own = (found[0] == x[0]).float().mean()
    assert own == pytest.approx(float(share[0]))


def test_smoothed_targets_without_mixing_are_torch_s_label_smoothing() -> None:
    label, logits = torch.tensor([0, 3, 4, 4]), torch.randn(4, CLASSES)
    for smoothing in (0.0, 0.1):
        targets = soft_targets(label, CLASSES, smoothing)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        loss = soft_cross_entropy(logits, targets)
        torch.testing.assert_close(loss, F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing))


def test_mixed_targets_share_the_classes_of_neighbours() -> None:
    """K = 5, e = .1: on-value .92, off-value .02; the share .25 is one's own."""
    share = torch.tensor([0.25, 0.25, 1.0, 1.0])
    found = soft_targets(torch.tensor([0, 3, 4, 1]), CLASSES, 0.1, share)
    expected = [[0.245, 0.02, 0.02, 0.695, 0.02], [0.695, 0.02, 0.02, 0.245, 0.02]]
    expected += [[0.02, 0.02, 0.02, 0.02, 0.92], [0.02, 0.92, 0.02, 0.02, 0.02]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_loss_is_made_in_fp32_and_falls_towards_the_mixture() -> None:
    targets = soft_targets(torch.tensor([0, 3]), CLASSES, 0.1, torch.tensor([0.7, 0.7]))
    logits = targets.log().requires_grad_()
    loss = soft_cross_entropy(logits, targets)
    entropy = -(targets * targets.log()).sum(1)
    torch.testing.assert_close(loss, entropy)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)  # nothing predicts it better
    with torch.autocast("cpu", torch.bfloat16):
        half = soft_cross_entropy(logits.bfloat16(), targets)
    assert half.dtype == torch.float32 and (half - entropy).abs().max() < 0.02
