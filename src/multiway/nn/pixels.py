"""From bytes to the numbers models were trained on: the means and deviations of the published recipes."""

from __future__ import annotations

import torch
from torch import Tensor

Colour = tuple[float, float, float]
"""A number per RGB channel, in [0, 1]."""

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
HALF: Colour = (0.5, 0.5, 0.5)
"""Mean and deviation of Inception, which BEiT and the first ViTs took over: pixels lie in [-1, 1]."""

Size = int | tuple[int, int]
"""Pixels of a square's side, or (height, width)."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def normalise(image: Tensor, mean: Colour, std: Colour) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, zero at ``mean`` and one at ``mean + std``; floats are such already and stay."""
    if image.is_floating_point():
        return image
    colours = 255 * torch.tensor([mean, std])[..., None, None]
    shift, scale = colours.to(image.device, non_blocking=True)  # nobody waits for the device
    return (image - shift).div_(scale)
