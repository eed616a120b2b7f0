"""Recipes of ViT: classification from scratch (vision.md 3.2).

``multiway train vit.NAME --data.root DIR --out RUN`` trains one on pictures in folders named after their class.
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
from multiway.systems.vit import PRESETS, ViT
from multiway.types import Batch, Objective


def quick() -> Run:
    """Classification from scratch: the digit in embedded scenes, or your folders of pictures; two CPU cores, minutes.

    Command: ``multiway train vit.quick --out runs/vit``, or with ``--data.root DIR``. Sizes and rates are ours. Not yet
    run by us.
    """
    return pictures.quick("vit.quick", PRESETS["vit_micro_patch4_32"], LIGHT)


def base() -> Run:
    """Classification from scratch on ImageNet-1k, as DeiT trains ViT-B/16: GPUs.

    Command: ``multiway train vit.base --data.root DIR --out runs/vit_base``. Not yet run by us.
    Source: vision.md 3.2 (DeiT, from memory there): rate 5e-4 per 512; repeated augmentation is not built.
    """
    model = dataclasses.replace(PRESETS["vit_base_patch16_224_mean"], pool="cls", head_std=0.02, drop_path=0.1)
    return pictures.imagenet(
        "vit.base", model, Classify(), batch=1024, epochs=300, warmup=5, scale=0.08, lr=1e-3, final_lr=1e-5, clip=0.0,
        ema=0.99996,
    )  # fmt: skip


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    return pictures.classify(run, ViT(pictures.with_classes(run.model)))


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pictures.build(run, out, assemble)
