"""Recipes of feature distillation: a student learns any teacher's features, then is tuned (vision.md 9.2).

``multiway train feature_distillation.NAME --data.root DIR --objective.teacher MODEL --out RUN`` trains one; fine-tuning
(``_tune``) takes ``--init`` with what that left in ``RUN/final``. Rates in the source are per 512 pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pictures
from multiway.recipes.pictures import Classify, Distil
from multiway.run import Run
from multiway.systems import beit, feature_distillation, vit
from multiway.types import Batch, Objective


def quick() -> Run:
    """Distillation of any teacher of the same grid, on embedded scenes or your pictures: two CPU cores, minutes.

    Command: ``multiway train feature_distillation.quick --objective.teacher runs/mae/final --out runs/fd``. Sizes and
    rates are ours. Not yet run by us.
    """
    model = feature_distillation.PRESETS["fd_vit_micro_patch4_32"]
    return pictures.quick("feature_distillation.quick", model, Distil())


def _distil(name: str, preset: str, lr: float) -> Run:
    """Distillation on ImageNet-1k (vision.md 9.2): 300 epochs, batch 2048, 10 epochs of warm-up."""
    return pictures.imagenet(
        f"feature_distillation.{name}", feature_distillation.PRESETS[preset], Distil(), batch=2048, epochs=300,
        warmup=10, scale=0.08, lr=4 * lr, final_lr=2e-5, clip=3.0,
    )  # fmt: skip


def clip_base() -> Run:
    """Distillation of CLIP B/16 on ImageNet-1k, 300 epochs: GPUs.

    Command: ``multiway train feature_distillation.clip_base --data.root DIR --objective.teacher MODEL --out runs/fd``.
    Not yet run by us.
    """
    return _distil("clip_base", "fd_clip_vit_base_patch16_224", 3e-4)


def clip_large() -> Run:
    """Distillation of CLIP L/14 on ImageNet-1k, 300 epochs: GPUs.

    Command: ``multiway train feature_distillation.clip_large --data.root DIR --objective.teacher MODEL --out runs/fd``.
    Not yet run by us.
    """
    return _distil("clip_large", "fd_clip_vit_large_patch14_224", 3e-4)


def dino_base() -> Run:
    """Distillation of DINO B/16 on ImageNet-1k, 300 epochs: GPUs; DeiT's settings are the same.

    Command: ``multiway train feature_distillation.dino_base --data.root DIR --objective.teacher MODEL --out runs/fd``.
    Not yet run by us.
    """
    return _distil("dino_base", "fd_dino_vit_base_patch16_224", 3e-4)


def swin_base() -> Run:
    """Distillation of EsViT's Swin-B on ImageNet-1k into a Swin V2-B, 300 epochs: GPUs.

    Command: ``multiway train feature_distillation.swin_base --data.root DIR --objective.teacher MODEL --out runs/fd``.
    Not yet run by us.
    """
    return _distil("swin_base", "fd_esvit_swinv2_base_window14_224", 2e-4)


def quick_tune() -> Run:
    """Fine-tuning of a quick student to the digit in embedded scenes, or your classes: two CPU cores, minutes.

    Command: ``multiway train feature_distillation.quick_tune --init runs/fd/final --out runs/fd_tune``. Not yet run by
    us.
    """
    colours = feature_distillation.PRESETS["fd_vit_micro_patch4_32"]
    model = dataclasses.replace(beit.PRESETS["beit_micro_patch4_32"], mean=colours.mean, std=colours.std)
    return pictures.quick_tune("feature_distillation.quick_tune", model)


def clip_base_tune() -> Run:
    """Fine-tuning of CLIP B/16's student on ImageNet-1k, 100 epochs (84.9 % in the original): GPUs.

    Command: ``multiway train feature_distillation.clip_base_tune --data.root DIR --init DIR/final --out runs/fd_tune``.
    Not yet run by us. Source: vision.md 9.2; DINO's: rate 1.5e-3 per 512, drop path .2; DeiT's: decay .65.
    """
    colours = feature_distillation.PRESETS["fd_clip_vit_base_patch16_224"]
    model = dataclasses.replace(
        beit.PRESETS["beit_base_patch16_224"], mean=colours.mean, std=colours.std, drop_path=0.3
    )
    return pictures.imagenet(
        "feature_distillation.clip_base_tune", model, Classify(), batch=2048, epochs=100, warmup=20, scale=0.08,
        lr=5e-3, final_lr=1e-6, layer_decay=0.6, clip=5.0,
    )  # fmt: skip


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches; to be rehearsed it needs no teacher."""
    if isinstance(run.objective, Classify):
        return pictures.classify(run, beit.BEiT(pictures.with_classes(run.model)))
    teacher = pictures.teacher_of(run) if run.objective.teacher else vit.ViT(vit.PRESETS["vit_base_patch16_224"])
    model = feature_distillation.Student(run.model)
    collate = pictures.plain_collate(pictures.branches(model))
    return feature_distillation.FeatureDistillation(model, teacher), collate


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pictures.build(run, out, assemble)
