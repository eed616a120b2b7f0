"""Zero-shot classification: a picture belongs to the class whose description it is nearest to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.errors import ConfigError, NumericsError
from multiway.metrics.accuracy import class_top1, top1, topk
from multiway.tasks.prompts import BARE, filled

NEEDS = frozenset({frozenset({"image"}), frozenset({"text"})})
"""What a model must encode: pictures alone and texts alone."""


def evaluate(
    embed_image: Callable[[Any], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    images: Sequence[Any] | Tensor,
    labels: Sequence[int] | np.ndarray,
    prompts: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Figures of naming the class of every picture: ``{"accuracy", "class_accuracy", "top5", "chance", "classes"}``.

    ``embed_image(images)``, ``embed_text(texts)``: unit vectors (N, D) float32 of all of them; labels: int (N,) in
    [0, C); prompts: per class its descriptions, of which every class needs one. ``accuracy`` of pictures, and its mean
    over the classes that occur, are in [0, 1]; ``top5``: share of pictures whose class is among the five nearest;
    ``chance``: 1 / C, of the first two.

    Raises ConfigError for a label without prompts, NumericsError when the descriptions of a class cancel out.
    """
    labels = _checked(labels, len(images), len(prompts))
    weights = classifier(embed_text, prompts)
    return _figures(embed_image(images).float().cpu() @ weights.T, labels)


def compare(
    embed_image: Callable[[Any], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    images: Sequence[Any] | Tensor,
    labels: Sequence[int] | np.ndarray,
    names: Sequence[str],
    templates: Sequence[str],
) -> dict[str, Any]:
    """Figures of `evaluate` for all templates together, and ``prompts``: ``{template: accuracy}`` of each by itself.

    names: of the C classes; templates: with ``{}`` where the name goes; ``{}`` itself is always among ``prompts``, and
    among those taken together only when it is given. Everything is embedded once. Raises as `evaluate`, and ConfigError
    for a template without ``{}``.
    """
    labels = _checked(labels, len(images), len(names))
    every = list(dict.fromkeys([*templates, BARE]))
    together = len(dict.fromkeys(templates))
    texts = [text for own in filled(names, every) for text in own]
    vectors = embed_text(texts).float().cpu().unflatten(0, (len(names), len(every)))
    found = embed_image(images).float().cpu()
    each = {template: top1((found @ vectors[:, i].T).numpy(), labels) for i, template in enumerate(every)}
    weights = _directions([own[:together] for own in vectors])
    return {**_figures(found @ weights.T, labels), "prompts": each}


def classifier(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> Tensor:
    """One unit vector (C, D) float32 per class: the mean of its descriptions' unit vectors, of length 1 again.

    Raises ConfigError for a class without descriptions, NumericsError when those of a class cancel out.

    Source: CLIP (Radford et al., 2021), section 3.1.4, prompt ensembling in the embedding space.
    """
    sizes = [len(own) for own in prompts]
    if 0 in sizes:
        raise ConfigError(f"zero-shot: class {sizes.index(0)} has no prompt, expected at least one")
    return _directions(embed_text([text for own in prompts for text in own]).float().cpu().split(sizes))


def _directions(vectors: Sequence[Tensor]) -> Tensor:
    """Of each class the mean of its unit vectors (P, D), of length 1 again: (C, D)."""
    means = torch.stack([own.mean(0) for own in vectors])
    lengths = means.norm(dim=1)
    if not (lengths > 1e-6).all():  # NaN too
        raise NumericsError(
            f"zero-shot: the prompts of class {int((~(lengths > 1e-6)).nonzero()[0])} have no mean direction"
        )
    return F.normalize(means, dim=1)


def _checked(labels: Sequence[int] | np.ndarray, images: int, classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if len(labels) != images or labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(
            f"zero-shot: {images} pictures with {len(labels)} labels from {labels.min()} to {labels.max()}, expected "
            f"one label each from 0 to {classes - 1}, the classes that have prompts"
        )
    return labels


def _figures(scores: Tensor, labels: np.ndarray) -> dict[str, Any]:
    found, classes = scores.numpy(), scores.shape[1]
    return {
        "accuracy": top1(found, labels),
        "class_accuracy": class_top1(found, labels),
        "top5": topk(found, labels, 5),
        "chance": 1 / classes,
        "classes": classes,
    }
