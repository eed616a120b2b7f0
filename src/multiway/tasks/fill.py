"""Filling in: predict hidden patches and words, and measure how many are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multiway.data.collate import Sample, Samples
from multiway.types import Batch

BATCH = 250
"""Pairs predicted at once."""


@torch.inference_mode()
def fill_patches(model: nn.Module, batch: Batch) -> Tensor:
    """Most likely visual token of every hidden patch: int64 (M,), in the order of ``image_hidden``."""
    tokens = model(batch["plan"], image=batch["image"], text=batch.get("text"), hide=batch["image_hide"])
    return model.image_logits(tokens, batch["image_hidden"]).argmax(-1)  # type: ignore[operator]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokenizer: Callable[[Tensor], Tensor],
    pairs: Sequence[Sample],
    collate: Callable[[Samples], Batch],
    ink: np.ndarray | None = None,
) -> dict[str, Any]:
    """Share of hidden patches' visual tokens and of hidden words of pairs that are predicted, in [0, 1].

    ``collate`` hides; ``ink``: bool (N, P), only these patches count (None = all). Beside each figure stands that of
    the trivial predictor, which always says the most frequent of the right answers.
    """
    device = next(model.parameters()).device
    image: list[tuple[Tensor, Tensor]] = []
    text: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(pairs), BATCH):
        batch = collate({"pair": pairs[first : first + BATCH]})
        batch = {key: value.to(device) for key, value in batch.items()}
        tokens = model(batch["plan"], image=batch["image"], text=batch["text"], hide=batch["image_hide"])
        hidden, codes = batch["image_hidden"], tokenizer(batch["image"])
        if ink is not None:
            counted = torch.from_numpy(ink[first : first + BATCH]).flatten().to(device)
            hidden = hidden[counted[hidden]]
        image.append((model.image_logits(tokens, hidden).argmax(-1), codes.flatten()[hidden]))  # type: ignore[operator]
        logits = model.text_logits(tokens, batch["text_hidden"])  # type: ignore[operator]
        text.append((logits.argmax(-1), batch["text_target"]))
    image_accuracy, image_trivial = _accuracy(image)
    text_accuracy, text_trivial = _accuracy(text)
    return {
        "image_code_accuracy": image_accuracy,
        "image_code_trivial": image_trivial,
        "text_token_accuracy": text_accuracy,
        "text_token_trivial": text_trivial,
    }


def _accuracy(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Share of right predictions, and of the most frequent target."""
    predicted, target = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
    return float((predicted == target).float().mean()), float(target.bincount().max() / len(target))
