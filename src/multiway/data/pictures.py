"""Batches of pictures alone: with hidden patches for pre-training, with classes for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from multiway.data.augment import NOWHERE, draw_mix, erase_box
from multiway.data.collate import Sample, Samples, basics
from multiway.errors import ConfigError
from multiway.types import Batch


@dataclass(frozen=True, kw_only=True)
class PictureCollate:
    """Batches of pictures, patches hidden.

    ``hide``: generator -> bool (P,), True = hidden (`multiway.data.hide` with its first arguments bound), None =
    nothing is; ``keep``: also list the visible patches, for encoders that read nothing else; ``branches``: residual
    branches that stochastic depth may drop (2 L), 0 = no draws.
    """

    hide: Callable[[np.random.Generator], np.ndarray] | None = None
    keep: bool = False
    branches: int = 0

    def __call__(self, samples: Samples) -> Batch:
        """Draw what is hidden from each sample's generator.

        Raises ConfigError when visible patches are listed and pictures have different numbers of them.
        """
        hide = None if self.hide is None else np.stack([self.hide(sample.rng) for sample in _all(samples)])
        batch = basics(samples, self.branches)
        if hide is None:
            return batch
        batch["image_hide"] = torch.from_numpy(hide)
        batch["image_hidden"] = torch.from_numpy(np.flatnonzero(hide))
        if self.keep:
            counts = np.unique(hide.shape[1] - hide.sum(1))
            if len(counts) > 1:
                raise ConfigError(
                    f"pictures of one batch have {counts[0]} to {counts[-1]} visible patches, but who reads nothing "
                    "else needs as many of each: hide an exact number (single patches, blocks, or cells that divide "
                    "the grid)"
                )
            batch["image_keep"] = torch.from_numpy(np.flatnonzero(~hide).reshape(len(hide), -1) % hide.shape[1])
        return batch


@dataclass(frozen=True, kw_only=True)
class LabelCollate:
    """Batches of pictures with their classes, and the draws of random erasing, mixup and CutMix.

    ``erase``: probability that a box of a picture is erased; ``mixup``, ``cutmix``: as in
    `multiway.data.augment.draw_mix`, of every pair of neighbours, drawn from its first sample's generator;
    ``branches`` as in `PictureCollate`.
    """

    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    branches: int = 0

    def __call__(self, samples: Samples) -> Batch:
        """Lay out pictures and classes; raises ConfigError for an odd number of pictures that are to be mixed."""
        flat = _all(samples)
        labels = [sample.label for sample in flat if sample.label is not None]
        assert len(labels) == len(flat), "the recipe required labels of all records"
        extra: Batch = {"label": torch.tensor(labels)}
        if self.mixup or self.cutmix:
            extra |= self._mix(flat)
        if self.erase:
            extra |= self._erase(flat)
        return {**basics(samples, self.branches), **extra}

    def _mix(self, flat: list[Sample]) -> Batch:
        if len(flat) % 2:
            raise ConfigError(
                f"mixup and CutMix mix pairs of pictures, but a micro-batch has {len(flat)} of them: take an even "
                "number of pictures per micro-batch and process, or set both to 0"
            )
        pairs = [draw_mix(*_size(sample), self.mixup, self.cutmix, sample.rng) for sample in flat[::2]]
        shares, boxes = zip(*pairs, strict=True)
        return {
            "mix_share": torch.tensor(shares, dtype=torch.float32).repeat_interleave(2),
            "mix_box": torch.tensor(boxes).repeat_interleave(2, dim=0),
        }

    def _erase(self, flat: list[Sample]) -> Batch:
        boxes, noise = [], []
        for sample in flat:
            box = erase_box(*_size(sample), sample.rng) if sample.rng.random() < self.erase else NOWHERE
            boxes.append(box)
            noise.append(sample.rng.standard_normal(3 * box[2] * box[3], dtype=np.float32))
        return {"erase_box": torch.tensor(boxes), "erase_noise": torch.from_numpy(np.concatenate(noise))}


def _all(samples: Samples) -> list[Sample]:
    return [sample for kind in samples for sample in samples[kind]]


def _size(sample: Sample) -> tuple[int, int]:
    """Height and width of its picture."""
    assert sample.image is not None, "a sample of this kind has a picture"
    return sample.image.shape[1], sample.image.shape[2]
