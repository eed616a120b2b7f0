"""Random erasing, mixup and CutMix on a normalised batch, and the loss against mixed classes.

The order is timm's: normalise, `erase`, `mix`. What is drawn comes with the batch (`erase_box`, `erase_noise`,
`mix_share`, `mix_box` in `multiway.types`). Boxes are int64 (B, 4): top, left, height, width in pixels; height 0 =
none. Neighbours are the pictures 2i and 2i + 1, so B is even where anything is mixed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def erase(x: Tensor, box: Tensor, noise: Tensor) -> Tensor:
    """Fill the boxes with noise: x float (B, C, H, W) -> the same shape.

    noise: float (E,), the (C, height, width) values of every box, packed in the order of the pictures.
    """
    return x.masked_scatter(_inside(box, *x.shape[2:]), noise.to(x.dtype))


def mix(x: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """Mix every picture with its neighbour: x float (B, C, H, W) -> the same shape.

    Where a box is, its inside is the neighbour's (CutMix); elsewhere the whole picture becomes ``share`` (B,) of itself
    and the rest of its neighbour (mixup).
    """
    own = torch.where(box[:, 2] > 0, 1.0, share).to(x.dtype)[:, None, None, None]
    return torch.lerp(_neighbour(x), x, own.masked_fill(_inside(box, *x.shape[2:]), 0.0))


def soft_targets(label: Tensor, classes: int, smoothing: float = 0.0, share: Tensor | None = None) -> Tensor:
    """Probabilities that are to be predicted: label int64 (B,) -> float32 (B, classes).

    ``smoothing`` e: every class has e / classes of the probability, the labelled one the rest as well; ``share`` (B,):
    of each picture's own class, the rest is its neighbour's, None = nothing was mixed.
    """
    target = torch.full((len(label), classes), smoothing / classes, device=label.device)
    target.scatter_(1, label[:, None], 1 - smoothing + smoothing / classes)
    return target if share is None else torch.lerp(_neighbour(target), target, share[:, None])


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every picture against probabilities: (B, K), (B, K) -> float32 (B,)."""
    with torch.autocast(logits.device.type, enabled=False):
        return -(targets * logits.float().log_softmax(-1)).sum(-1)


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in the boxes: bool (B, 1, H, W)."""
    top, left, rows, columns = (part[:, None] for part in box.unbind(1))
    y, x = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    inside_y, inside_x = (y >= top) & (y < top + rows), (x >= left) & (x < left + columns)
    return inside_y[:, None, :, None] & inside_x[:, None, None, :]


def _neighbour(x: Tensor) -> Tensor:
    """Every pair of rows swapped: (B, ...) -> (B, ...)."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
