"""Image-text retrieval: tune two views to find each other, and measure who is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multiway.errors import ConfigError
from multiway.metrics.recall import chance, recall
from multiway.objectives.contrastive import Negatives, pairwise_sigmoid, symmetric_cross_entropy
from multiway.types import Across, Batch, Objective, StepOutput


class ImageTextContrast(Objective):
    """Contrast pictures and texts, each encoded alone (CLIP; BEiT-3's ``_itc`` tuning, and that for retrieval).

    The model needs ``embed_pairs(plan, image=, text=, keep=, draws=) -> unit vectors (B, D) of both`` and
    ``temperature() -> factor on cosines``; ``limit_temperature()``, where it has one, is called after every step.
    Batches are `DualCollate`'s. Term: ``contrast``.

    Several micro-batches make one large batch whose activations are held one micro-batch at a time: each is encoded
    twice, the second time in the backward, when the gradient of its vectors is known (gradient caching, Gao et al.
    2021, arXiv 2101.06983). The loss and its gradients are those of the whole. Not for models with batch norms.
    """

    splittable: bool = False
    needs: ClassVar[frozenset[frozenset[str]]] = frozenset({frozenset({"image"}), frozenset({"text"})})

    def __init__(self, model: nn.Module, negatives: Negatives = "gathered") -> None:
        super().__init__()
        self.model = model
        self.negatives: Negatives = negatives
        self.joins = not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Number of pairs."""
        return {"contrast": len(batch["plan"].starts["image"])}

    def forward(
        self, batch: Batch | Sequence[Batch], counts: Mapping[str, float], across: Across = Across()
    ) -> StepOutput:
        """Every local pair against all pairs of all ranks; ``batch``: one, or the micro-batches of a step."""
        if isinstance(batch, Mapping):
            image, text = self.embed(batch)
        else:
            parts = [checkpoint(self.embed, part, use_reentrant=False, preserve_rng_state=False) for part in batch]
            image, text = (torch.cat(own) for own in zip(*parts, strict=True))
        losses, hits = self.compare(image, text, across)
        sums = {"contrast": losses.sum().detach(), "contrast/accuracy": hits.sum()}
        return StepOutput(losses.sum() / counts["contrast"], sums)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of the pictures and of the texts of a batch."""
        return self.model.embed_pairs(
            batch["plan"], image=batch["image"], text=batch["text"], keep=batch.get("image_keep"),
            draws=batch.get("drop_path"),
        )  # fmt: skip

    def compare(self, image: Tensor, text: Tensor, across: Across) -> tuple[Tensor, Tensor]:
        """Losses and hits (B,) of local pairs, both ways."""
        scale = self.model.temperature()
        return symmetric_cross_entropy(image, text, scale, across.gather, across.rank, self.negatives)

    def after_step(self, step: int) -> None:
        """Keep the temperature within its limits."""
        limit = getattr(self.model, "limit_temperature", None)
        if limit is not None:
            limit()


class ImageTextSigmoid(ImageTextContrast):
    """The same batches, every pair of a picture and a text judged on its own (SigLIP); negatives are always gathered.

    The model needs ``bias() -> what is added to its scores``, too.
    """

    def compare(self, image: Tensor, text: Tensor, across: Across) -> tuple[Tensor, Tensor]:
        """Losses and hits (B,) of local pictures among the texts of all ranks."""
        scale, bias = self.model.temperature(), self.model.bias()
        return pairwise_sigmoid(image, text, scale, bias, across.gather, across.rank)


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
