"""Contrast between two views of the same things (CLIP's symmetric InfoNCE)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_cross_entropy(
    a: Tensor, b: Tensor, scale: Tensor, gather: Callable[[Tensor], Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Loss and hit of every local pair among all pairs of all ranks.

    a, b: unit vectors (B, D), row i of one belongs to row i of the other; ``scale`` multiplies the cosines; ``gather``
    concatenates (B, D) over ranks with gradient, ``rank`` is this rank's place in it. Returns the mean of both
    directions' losses and of their hits (the partner is the nearest of all), float32 (B,) each.
    Source: masked.md 1.9; the loss is global, as BEiT-3's.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, scale = a.float(), b.float(), scale.float()
        target = torch.arange(len(a), device=a.device) + rank * len(a)
        to_b, to_a = scale * a @ gather(b).T, scale * b @ gather(a).T  # (B, world * B)
        loss = (F.cross_entropy(to_b, target, reduction="none") + F.cross_entropy(to_a, target, reduction="none")) / 2
        hit = ((to_b.argmax(-1) == target).float() + (to_a.argmax(-1) == target).float()) / 2
    return loss, hit.detach()
