"""Zero-shot classification: a picture belongs to the class whose description it is nearest to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.errors import ConfigError, NumericsError
from multiway.metrics.accuracy import top1

NEEDS = frozenset({frozenset({"image"}), frozenset({"text"})})
"""What a model must encode: pictures alone and texts alone."""


def evaluate(
    embed_image: Callable[[Any], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    images: Sequence[Any] | Tensor,
    labels: Sequence[int] | np.ndarray,
    prompts: Sequence[Sequence[str]],
) -> dict[str, float]:
    """Accuracy of naming the class of every picture: ``{"accuracy", "chance", "classes"}``, the first two in [0, 1].

    ``embed_image(images)``, ``embed_text(texts)``: unit vectors (N, D) float32 of all of them; labels: int (N,) in
    [0, C); prompts: per class its descriptions, of which every class needs one; ``chance``: 1 / C.

    Raises ConfigError for a label without prompts, NumericsError when the descriptions of a class cancel out.
    """
    labels = np.asarray(labels)
    if len(labels) != len(images) or labels.min() < 0 or labels.max() >= len(prompts):
        raise ConfigError(
            f"zero-shot: {len(images)} pictures with {len(labels)} labels from {labels.min()} to {labels.max()}, "
            f"expected one label each from 0 to {len(prompts) - 1}, the classes that have prompts"
        )
    scores = embed_image(images).float().cpu() @ classifier(embed_text, prompts).T
    return {"accuracy": top1(scores.numpy(), labels), "chance": 1 / len(prompts), "classes": len(prompts)}


def classifier(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> Tensor:
    """One unit vector (C, D) float32 per class: the mean of its descriptions' unit vectors, of length 1 again.

    Raises ConfigError for a class without descriptions, NumericsError when those of a class cancel out.

    Source: CLIP (Radford et al., 2021), section 3.1.4, prompt ensembling in the embedding space.
    """
    sizes = [len(own) for own in prompts]
    if 0 in sizes:
        raise ConfigError(f"zero-shot: class {sizes.index(0)} has no prompt, expected at least one")
    vectors = embed_text([text for own in prompts for text in own]).float().cpu()
    means = torch.stack([own.mean(0) for own in vectors.split(sizes)])
    lengths = means.norm(dim=1)
    if not (lengths > 1e-6).all():  # NaN too
        raise NumericsError(
            f"zero-shot: the prompts of class {int((~(lengths > 1e-6)).nonzero()[0])} have no mean direction"
        )
    return F.normalize(means, dim=1)
