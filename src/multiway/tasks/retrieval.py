"""Image-text retrieval: tune two views to find each other, and measure who is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from multiway.errors import ConfigError
from multiway.metrics.recall import chance, recall
from multiway.objectives.contrastive import symmetric_cross_entropy
from multiway.types import Across, Batch, Objective, StepOutput


class ImageTextContrast(Objective):
    """Contrast pictures and texts, each encoded alone (BEiT-3's ``_itc`` tuning, and its fine-tuning for retrieval).

    The model needs ``forward(plan, image=, text=, keep=, draws=) -> Tokens``, ``embed(tokens, modality) -> unit
    vectors`` and ``temperature() -> factor on cosines``; batches are `DualCollate`'s. Term: ``contrast``.
    """

    splittable: ClassVar[bool] = False
    needs: ClassVar[frozenset[frozenset[str]]] = frozenset({frozenset({"image"}), frozenset({"text"})})

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Number of pairs."""
        return {"contrast": len(batch["plan"].starts["image"])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Every local pair against all pairs of all ranks, both ways."""
        tokens = self.model(
            batch["plan"], image=batch["image"], text=batch["text"], keep=batch.get("image_keep"),
            draws=batch.get("drop_path"),
        )  # fmt: skip
        image, text = self.model.embed(tokens, "image"), self.model.embed(tokens, "text")
        losses, hits = symmetric_cross_entropy(image, text, self.model.temperature(), across.gather, across.rank)
        sums = {"contrast": losses.sum().detach(), "contrast/accuracy": hits.sum()}
        return StepOutput(losses.sum() / counts["contrast"], sums)


def evaluate(
    embed_image: Callable[[Any], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    images: Sequence[Any] | Tensor,
    captions: Sequence[str],
    owner: Sequence[int] | np.ndarray | None = None,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, shares in [0, 1], with the recall of random answers beside it.

    ``embed_image(images)``, ``embed_text(captions)``: unit vectors (N, D) and (M, D) float32 of all of them; owner:
    int (M,), the picture each caption describes, every picture having at least one; None = the i-th caption the i-th.
    A picture counts as answered by any of its captions (the Karpathy protocol); ties as in
    `multiway.metrics.recall.recall`.

    Returns ``{"candidates": N, "captions": M, "image_to_text": {"r1", "r5", "r10"}, "text_to_image": {...}, "chance":
    {"image_to_text": {...}, "text_to_image": {...}}}``. Raises ConfigError when captions and owners do not match.
    """
    pictures = np.arange(len(images))
    owner = np.arange(len(captions)) if owner is None else np.asarray(owner)
    if len(owner) != len(captions) or not np.array_equal(np.unique(owner), pictures):
        raise ConfigError(
            f"retrieval: {len(captions)} captions with {len(owner)} owners do not describe each of {len(images)} "
            "pictures: expected one owner per caption, a picture's number, and a caption for every picture"
        )
    image = embed_image(images).float().cpu().numpy()
    text = embed_text(list(captions)).float().cpu().numpy()
    return {
        "candidates": len(pictures),
        "captions": len(captions),
        "image_to_text": recall(image, text, pictures, owner),
        "text_to_image": recall(text, image, owner, pictures),
        "chance": {"image_to_text": chance(pictures, owner), "text_to_image": chance(owner, pictures)},
    }
