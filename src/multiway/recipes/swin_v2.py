"""Recipes of Swin V2: classification from scratch, and fine-tuning of what was pre-trained (vision.md 6.2).

``multiway train swin_v2.NAME --data.root DIR --out RUN`` trains one; fine-tuning (``_tune``) takes ``--init`` with what
pre-training left in ``RUN/final``, or converted weights. Rates in the source are per 512 pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pictures
from multiway.recipes.pictures import LIGHT, Classify
from multiway.run import Run
from multiway.systems.swin_v2 import PRESETS, SwinV2
from multiway.types import Batch, Objective

IMAGENET_22K = 14_197_122


def quick() -> Run:
    """Classification from scratch: the digit in embedded scenes, or your folders of pictures; two CPU cores, minutes.

    Command: ``multiway train swin_v2.quick --out runs/swin_v2``, or with ``--data.root DIR``. Sizes and rates are
    ours. Not yet run by us.
    """
    model = dataclasses.replace(PRESETS["swinv2_micro_patch2_window4_32"], patch=4, image_px=64)
    return pictures.quick("swin_v2.quick", model, LIGHT)


def _scratch(name: str, preset: str) -> Run:
    """300 epochs of ImageNet-1k: rate 5e-4 per 512, batch 1024, 20 epochs of warm-up."""
    return pictures.imagenet(
        f"swin_v2.{name}", PRESETS[preset], Classify(), batch=1024, epochs=300, warmup=20, scale=0.08, lr=1e-3,
        first_lr=1e-6, final_lr=1e-5, clip=5.0,
    )  # fmt: skip


def tiny() -> Run:
    """Classification of ImageNet-1k from scratch, Swin V2-T, 300 epochs (81.8 % in the original): GPUs.

    Command: ``multiway train swin_v2.tiny --data.root DIR --out runs/swin_v2_tiny``. Not yet run by us.
    """
    return _scratch("tiny", "swinv2_tiny_window8_256")


def small() -> Run:
    """Classification of ImageNet-1k from scratch, Swin V2-S, 300 epochs (83.7 % in the original): GPUs.

    Command: ``multiway train swin_v2.small --data.root DIR --out runs/swin_v2_small``. Not yet run by us.
    """
    return _scratch("small", "swinv2_small_window8_256")


def base() -> Run:
    """Classification of ImageNet-1k from scratch, Swin V2-B, 300 epochs (84.2 % in the original): GPUs.

    Command: ``multiway train swin_v2.base --data.root DIR --out runs/swin_v2_base``. Not yet run by us.
    """
    return _scratch("base", "swinv2_base_window8_256")


def base_22k() -> Run:
    """Classification of ImageNet-22k, Swin V2-B, 90 epochs: GPUs.

    Command: ``multiway train swin_v2.base_22k --data.root DIR --out runs/swin_v2_22k``. Not yet run by us.
    """
    model = dataclasses.replace(PRESETS["swinv2_base_window12_192"], classes=21841, drop_path=0.2)
    return pictures.imagenet(
        "swin_v2.base_22k", model, Classify(), batch=4096, epochs=90, warmup=5, scale=0.08, lr=1e-3, first_lr=1e-6,
        final_lr=1e-5, clip=5.0, weight_decay=0.1, pictures=IMAGENET_22K,
    )  # fmt: skip


def base_384_tune() -> Run:
    """Fine-tuning on ImageNet-1k at 384 pixels of what was trained on ImageNet-22k, Swin V2-B, 30 epochs: GPUs.

    Command: ``multiway train swin_v2.base_384_tune --data.root DIR --init DIR/final --out runs/swin_v2_tune``. Not yet
    run by us. The classifier starts anew (the original takes over the rows of the 1,000 classes).
    """
    model = dataclasses.replace(PRESETS["swinv2_base_window12to24_192to384"], drop_path=0.2)
    return pictures.imagenet(
        "swin_v2.base_384_tune", model, Classify(), batch=1024, epochs=30, warmup=5, scale=0.08, lr=4e-5,
        first_lr=4e-8, final_lr=4e-7, clip=5.0, weight_decay=1e-8,
    )  # fmt: skip


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    return pictures.classify(run, SwinV2(pictures.with_classes(run.model)))


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pictures.build(run, out, assemble)
