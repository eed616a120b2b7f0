"""Cross-entropy at hidden places."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 2**28
"""Of fp32 logits that may exist at once, 256 MiB. In smaller parts the gradient of a large vocabulary, which every part
adds to, takes longer than the products."""


def masked_cross_entropy(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, classes: int, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss and hit of the prediction at every hidden place: int64 (M,) -> float32 (M,), float32 (M,) of 0 or 1.

    ``logits``: places (m,) -> scores (m, ``classes``); ``target``: int64 (M,); ``smoothing``: share of the probability
    that is spread evenly over the other classes. Where all logits together would be larger than LOGITS_BYTES they are
    made part by part, and again in the backward: one part is in memory at a time.
    """
    step = max(1, LOGITS_BYTES // (4 * classes))
    spread = smoothing * classes / max(1, classes - 1)  # torch spreads it over all classes, the target's too
    if len(hidden) <= step:
        return _cross_entropy(logits, hidden, target, spread)
    parts = [
        checkpoint(_cross_entropy, logits, *part, spread, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(step), target.split(step), strict=True)
    ]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def _cross_entropy(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, spread: float
) -> tuple[Tensor, Tensor]:
    scores = logits(hidden)
    with torch.autocast(scores.device.type, enabled=False):
        loss = F.cross_entropy(scores.float(), target, reduction="none", label_smoothing=spread)
    return loss, (scores.detach().argmax(-1) == target).float()
