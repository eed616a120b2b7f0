"""Image-text retrieval: tune two views to find each other, and measure who is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multiway.backbones.vit import whole_patches
from multiway.errors import ConfigError
from multiway.metrics.recall import chance, nearest, recall
from multiway.objectives.contrastive import Negatives, pairwise_sigmoid, symmetric_cross_entropy
from multiway.plan import make_plan
from multiway.tasks.needs import check
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


Rerank = Callable[[np.ndarray, np.ndarray], Tensor]
"""Numbers of pictures and of captions, int64 (M,) each, by picture -> how well each pair fits: float (M,)."""

TOP = 32
"""Candidates of each query that are re-ordered (masked.md 5.4)."""


def evaluate(
    embed_image: Callable[[Any], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    images: Sequence[Any] | Tensor,
    captions: Sequence[str],
    owner: Sequence[int] | np.ndarray | None = None,
    rerank: Rerank | None = None,
    top: int = TOP,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, shares in [0, 1], with the recall of random answers beside it.

    ``embed_image(images)``, ``embed_text(captions)``: unit vectors (N, D) and (M, D) float32 of all of them; owner:
    int (M,), the picture each caption describes, every picture having at least one; None = the i-th caption the i-th.
    A picture counts as answered by any of its captions (the Karpathy protocol); ties as in
    `multiway.metrics.recall.recall`. ``rerank``: orders the ``top`` nearest candidates of each query anew; a pair that
    both its picture and its caption find is scored once; None = nothing does.

    Returns ``{"candidates": N, "captions": M, "image_to_text": {"r1", "r5", "r10"}, "text_to_image": {...}, "chance":
    {"image_to_text": {...}, "text_to_image": {...}}}``, and ``"reranked": {"top", "pairs": how many were scored,
    "image_to_text", "text_to_image"}``. Raises ConfigError when captions and owners do not match, and for ``top`` < 1.
    """
    pictures = np.arange(len(images))
    owner = np.arange(len(captions)) if owner is None else np.asarray(owner)
    if len(owner) != len(captions) or not np.array_equal(np.unique(owner), pictures):
        raise ConfigError(
            f"retrieval: {len(captions)} captions with {len(owner)} owners do not describe each of {len(images)} "
            "pictures: expected one owner per caption, a picture's number, and a caption for every picture"
        )
    if top < 1:
        raise ConfigError(f"re-ranking orders the nearest 1 or more candidates anew, got {top}")
    image = embed_image(images).float().cpu().numpy()
    text = embed_text(list(captions)).float().cpu().numpy()
    found: dict[str, Any] = {
        "candidates": len(pictures),
        "captions": len(captions),
        "image_to_text": recall(image, text, pictures, owner),
        "text_to_image": recall(text, image, owner, pictures),
        "chance": {"image_to_text": chance(pictures, owner), "text_to_image": chance(owner, pictures)},
    }
    if rerank is not None:
        found["reranked"] = _reranked(image, text, owner, rerank, top)
    return found


def _reranked(image: np.ndarray, text: np.ndarray, owner: np.ndarray, rerank: Rerank, top: int) -> dict[str, Any]:
    """Recall when the nearest candidates of every query are ordered anew."""
    pictures, captions = np.arange(len(image)), np.arange(len(text))
    told, seen = nearest(image, text, top), nearest(text, image, top)
    found = np.concatenate([pictures[:, None] * len(text) + told, seen * len(text) + captions[:, None]], axis=None)
    pairs, place = np.unique(found, return_inverse=True)
    scores = rerank(pairs // len(text), pairs % len(text)).float().cpu().numpy()[place]
    to_text, to_image = np.split(scores, [told.size])
    return {
        "top": top,
        "pairs": len(pairs),
        "image_to_text": recall(image, text, pictures, owner, first=(told, to_text.reshape(told.shape))),
        "text_to_image": recall(text, image, owner, pictures, first=(seen, to_image.reshape(seen.shape))),
    }


def require_match(model: Any) -> None:
    """Raise ConfigError, saying what would fit, unless a model can say how well a picture and a text fit."""
    check(model, frozenset({frozenset({"image", "text"})}), "re-ranking")
    if not hasattr(model, "match_head"):
        raise ConfigError(
            "re-ranking needs a model with a head that tells pairs that belong together from others, such as a VLMo or "
            f"FLAVA has; this {type(model).__name__} has none: name another model to re-rank with"
        )


@torch.inference_mode()
def match(model: Any, image: Tensor, text: Sequence[Tensor]) -> Tensor:
    """How well the i-th picture and the i-th text fit: float32 (B,), log-odds that they belong together.

    ``model``: answers ``match(plan, image=, text=) -> (B,)``, with its ``match_head``; the plan has ``model.leading``
    tokens (1 where it does not say) in front of the patches of each picture. image: uint8 (B, 3, H, W); text: int64 ids
    with their specials.
    """
    rows, columns = whole_patches(model.config.image_px, model.config.patch)
    tokens = getattr(model, "leading", 1) + rows * columns
    plan = make_plan({"pair": {"image": [tokens] * len(image), "text": [len(ids) for ids in text]}}).to(image.device)
    return model.match(plan, image=image, text=torch.cat(list(text)).to(image.device)).float()
