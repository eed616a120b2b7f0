"""Recipes of ViT: classification from scratch, and fine-tuning of any plain encoder's weights (vision.md 3.2).

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
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.systems.vit import PRESETS, Config, ViT
from multiway.types import Batch, Objective

IMAGENET = 1_281_167
"""Training pictures of ImageNet-1k, which epochs of the published recipes count."""


def quick() -> Run:
    """Classification from scratch: the digit in embedded scenes, or your folders of pictures; two CPU cores, minutes.

    Command: ``multiway train vit.quick --out runs/vit``, or with ``--data.root DIR``. Sizes and rates are ours. Not yet
    run by us.
    """
    return Run(
        recipe="vit.quick",
        model=Config(dim=192, depth=6, heads=3, hidden=768, patch=8, image_px=64, share=1.0),
        objective=LIGHT,
        data=Data(images=128, image_scale=0.5, flip=False, jitter=0.0),
        optim=Optim(lr=1e-3, matrices="muon"),
        schedule=Schedule(steps=800, warmup=80),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=200),
    )


def base() -> Run:
    """Classification from scratch on ImageNet-1k, as DeiT trains ViT-B/16: GPUs.

    Command: ``multiway train vit.base --data.root DIR --out runs/vit_base``. Not yet run by us.
    Source: vision.md 3.2 (DeiT, from memory there): rate 5e-4 per 512, 300 epochs, 5 of warm-up; repeated augmentation
    is not built.
    """
    epoch = IMAGENET // 1024
    return Run(
        recipe="vit.base",
        model=dataclasses.replace(PRESETS["vit_base_patch16_224_mean"], pool="cls", head_std=0.02, drop_path=0.1),
        objective=Classify(),
        data=Data(images=1024, image_scale=0.08, jitter=0.0, workers=8),
        optim=Optim(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, clip=0.0, ema=0.99996),
        schedule=Schedule(steps=300 * epoch, warmup=5 * epoch),
    )


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    return pictures.classify(run, ViT(pictures.with_classes(run.model)))


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pictures.build(run, out, assemble)
