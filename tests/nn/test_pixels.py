from __future__ import annotations

import torch

from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise, sides


def test_bytes_become_zero_at_the_mean_and_one_a_deviation_above() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    found = normalise(image, IMAGENET_MEAN, IMAGENET_STD)
    assert found.dtype == torch.float32 and found.shape == image.shape
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD)):
        want = (torch.arange(256.0).view(16, 16) / 255 - mean) / std
        torch.testing.assert_close(found[1, channel], want, rtol=0, atol=1e-6)


def test_floats_stay_as_they_are() -> None:
    image = torch.randn(1, 3, 4, 4)
    assert normalise(image, IMAGENET_MEAN, IMAGENET_STD) is image


def test_a_side_is_that_of_a_square() -> None:
    assert sides(224) == (224, 224) and sides((32, 48)) == (32, 48)
