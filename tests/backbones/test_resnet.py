"""The residual network: sizes, what hiding means, and what batch norms do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from multiway.backbones.resnet import ResNet


def small(hide_token: bool = True) -> ResNet:
    model = ResNet(8, (1, 2, 1), hide_token)
    torch.manual_seed(0)
    model.init_weights()
    return model


def pictures(seed: int = 0, px: int = 48) -> Tensor:
    return torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(seed))


def hidden(px: int = 48) -> Tensor:
    return torch.rand(3, (px // 4) ** 2, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize(
    ("dim", "depths", "total"),
    [(64, (3, 4, 6, 3), 23_508_032), (64, (3, 4, 23, 3), 42_500_160), (128, (3, 4, 6, 3), 93_907_072)],
    ids=["50", "101", "50x2"],
)
def test_parameters(dim: int, depths: tuple[int, ...], total: int) -> None:
    """Of torchvision's resnet50 and resnet101 without their classifiers; every width of the third is doubled."""
    with torch.device("meta"):
        model = ResNet(dim, depths, hide_token=False)
    assert sum(p.numel() for p in model.parameters()) == total
    assert len(model.blocks) == sum(depths)


def test_cells_come_row_by_row_at_the_strides_of_the_stages() -> None:
    model = small().eval()
    image = pictures()[..., :32]
    out = model(image)
    assert out.shape == (3, 3 * 2, model.width) and model.width == 8 * 4 * 4
    right = image.clone()
    right[..., 24:, 24:] += 1  # the lower right corner: cell (2, 1), and little of the others
    moved = (model(right) - out).abs().amax(-1)
    assert moved.argmax(-1).tolist() == [5, 5, 5]


@pytest.mark.parametrize("training", [True, False])
def test_hidden_pixels_are_not_read(training: bool) -> None:
    """Not by the stem's overlapping windows either, nor by its statistics."""
    model = small().train(training)
    image, hide = pictures(), hidden()
    inside = hide.view(3, 1, 12, 12).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(inside, pictures(5) * 10, image)
    assert torch.equal(model(image, hide), model(other, hide))
    assert not torch.allclose(model(image, hide), model(image), atol=1e-2)
    shown = torch.where(inside, image, pictures(5))
    assert not torch.allclose(model(image, hide), model(shown, hide), atol=1e-2)


def test_the_token_takes_the_place_of_hidden_patches() -> None:
    model = small()
    (grad,) = torch.autograd.grad(model(pictures(), hidden()).square().sum(), model.hide_token)
    assert grad.abs().min() > 0
    assert small(hide_token=False).hide_token is None


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_running_statistics_are_saved_and_serve_evaluation() -> None:
    model = small()
    for seed in range(60):
        model(pictures(seed))
    first = norms(model)[0]
    convolved = model.embed[0](torch.cat([pictures(seed) for seed in range(40, 60)]))
    torch.testing.assert_close(first.running_mean, convolved.mean((0, 2, 3)), rtol=0, atol=0.05)
    torch.testing.assert_close(first.running_var, convolved.var((0, 2, 3)), rtol=0.1, atol=0)
    other = small()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    model.eval(), other.eval()
    assert torch.equal(model(pictures(7)), other(pictures(7)))
    alone = torch.cat([model(picture[None]) for picture in pictures(7)])  # pictures do not see each other
    torch.testing.assert_close(alone, model(pictures(7)), rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(model.state_dict())
    model(pictures(8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pictures_see_each_other_while_training() -> None:
    model = small()
    alone = torch.cat([model(picture[None]) for picture in pictures()])
    assert not torch.allclose(alone, model(pictures()), atol=1e-2)


def test_initialisation_resets_everything() -> None:
    model = small()
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    fresh = small().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    conv = model.blocks[-1].conv2[0]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
