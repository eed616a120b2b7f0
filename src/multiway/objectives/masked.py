"""Cross-entropy at hidden places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and hit of every prediction: logits (M, V), target int64 (M,) -> float32 (M,), float32 (M,) of 0 or 1."""
    with torch.autocast(logits.device.type, enabled=False):
        loss = F.cross_entropy(logits.float(), target, reduction="none")
    return loss, (logits.detach().argmax(-1) == target).float()
