"""Image classification: fine-tuning any encoder of pictures that has a classifier, and measuring it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multiway.errors import ConfigError
from multiway.metrics.accuracy import top1, topk
from multiway.objectives.mixing import erase, mix, soft_cross_entropy, soft_targets
from multiway.tasks.needs import check
from multiway.types import Across, Batch, Objective, StepOutput

NEEDS = frozenset({frozenset({"image"})})
"""What a model must encode: pictures alone."""


class ImageClassification(Objective):
    """Cross-entropy against smoothed classes, or mixed ones where batches mix pictures.

    ``model``: answers ``pixels(image)`` and ``classify(image, draws)``, and its config has ``classes`` > 0;
    ``smoothing``: share of the probability that is spread over all classes. Batches carry ``image`` and ``label``, and
    perhaps what `multiway.objectives.mixing` applies. Term: ``label``; its accuracy counts a mixed picture's own class.
    Source: vision.md 2.3.
    """

    def __init__(self, model: Any, smoothing: float = 0.0) -> None:
        super().__init__()
        check(model, NEEDS, "image classification")
        if not model.config.classes:
            raise ConfigError(f"{type(model).__name__} has no classifier: set model.classes to the number of classes")
        self.model = model
        self.smoothing = smoothing
        self.splittable = not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pictures."""
        return {"label": len(batch["label"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Normalise, erase, mix, classify."""
        image, label, share = self.model.pixels(batch["image"]), batch["label"], batch.get("mix_share")
        if "erase_box" in batch:
            image = erase(image, batch["erase_box"], batch["erase_noise"])
        if share is not None:
            image = mix(image, share, batch["mix_box"])
        logits = self.model.classify(image, batch.get("drop_path"))
        loss = soft_cross_entropy(logits, soft_targets(label, logits.shape[1], self.smoothing, share)).sum()
        hits = (logits.argmax(-1) == label).sum()
        return StepOutput(loss / counts["label"], {"label": loss.detach(), "label/accuracy": hits.detach().float()})


@torch.inference_mode()
def evaluate(model: Any, batches: Iterable[tuple[Tensor, Tensor | np.ndarray]]) -> dict[str, float]:
    """Accuracy of a classifier: ``{"top1", "top5", "loss", "pictures", "chance"}``, shares in [0, 1].

    ``batches``: pictures uint8 (B, 3, H, W) and their classes int (B,). ``loss``: cross-entropy, nats; ``chance``: of
    top1. Raises ConfigError for a class the model has not.
    """
    device = next(model.parameters()).device
    found = []
    labels = []
    for image, label in batches:
        found.append(model.classify(image.to(device)).float().cpu())
        labels.append(torch.as_tensor(label))
    scores, truth = torch.cat(found), torch.cat(labels).long()
    classes = scores.shape[1]
    if int(truth.max()) >= classes:
        raise ConfigError(f"class {int(truth.max())} among the pictures, but the model has {classes}, numbered from 0")
    return {
        "top1": top1(scores.numpy(), truth.numpy()),
        "top5": topk(scores.numpy(), truth.numpy(), min(5, classes)),
        "loss": float(torch.nn.functional.cross_entropy(scores, truth)),
        "pictures": len(truth),
        "chance": 1 / classes,
    }
