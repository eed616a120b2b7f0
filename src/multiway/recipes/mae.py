"""Recipes of MAE: masked autoencoding, and the fine-tuning of its encoder to classes (vision.md 4.2, 4.3).

``multiway train mae.NAME --data.root DIR --out RUN`` trains one; fine-tuning (``_tune``) takes ``--init`` with what
pre-training left in ``RUN/final``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pictures
from multiway.recipes.pictures import Classify, Hiding
from multiway.run import Run
from multiway.systems import mae, vit
from multiway.types import Batch, Objective


def quick() -> Run:
    """Masked autoencoding of embedded scenes, or of your pictures: two CPU cores, minutes.

    Command: ``multiway train mae.quick --out runs/mae``, or with ``--data.root DIR``. Sizes and rates are ours. Not yet
    run by us.
    """
    return pictures.quick("mae.quick", mae.PRESETS["mae_vit_micro_patch4_32"], Hiding())


def base() -> Run:
    """Masked autoencoding of ViT-B/16 on ImageNet-1k, 800 epochs: GPUs.

    Command: ``multiway train mae.base --data.root DIR --out runs/mae_base``. Not yet run by us.
    Source: vision.md 4.2: rate 1.5e-4 per 256, no clipping.
    """
    return pictures.imagenet(
        "mae.base", mae.PRESETS["mae_vit_base_patch16_224"], Hiding(), batch=4096, epochs=800, warmup=40, scale=0.2,
        lr=1.5e-4 * 16, final_lr=0.0, betas=(0.9, 0.95), clip=0.0,
    )  # fmt: skip


def large() -> Run:
    """Masked autoencoding of ViT-L/16 on ImageNet-1k, 800 epochs: GPUs (42 hours on 64 V100 in the original).

    Command: ``multiway train mae.large --data.root DIR --out runs/mae_large``. Not yet run by us. Source: as base.
    """
    return dataclasses.replace(base(), recipe="mae.large", model=mae.PRESETS["mae_vit_large_patch16_224"])


def huge() -> Run:
    """Masked autoencoding of ViT-H/14 on ImageNet-1k, 800 epochs: GPUs.

    Command: ``multiway train mae.huge --data.root DIR --out runs/mae_huge``. Not yet run by us. Source: as base.
    """
    return dataclasses.replace(base(), recipe="mae.huge", model=mae.PRESETS["mae_vit_huge_patch14_224"])


def quick_tune() -> Run:
    """Fine-tuning of a quick encoder to the digit in embedded scenes, or your classes: two CPU cores, minutes.

    Command: ``multiway train mae.quick_tune --init runs/mae/final --out runs/mae_tune``. Not yet run by us.
    """
    colours = mae.PRESETS["mae_vit_micro_patch4_32"]
    model = dataclasses.replace(
        vit.PRESETS["vit_micro_patch4_32"], pool="mean", mean=colours.mean, std=colours.std, head_std=2e-5
    )
    return pictures.quick_tune("mae.quick_tune", model)


def _tune(name: str, preset: str, epochs: int, lr: float, decay: float, drop_path: float) -> Run:
    """Fine-tuning on ImageNet-1k (vision.md 4.3); rates per 256."""
    return pictures.imagenet(
        f"mae.{name}", dataclasses.replace(vit.PRESETS[preset], drop_path=drop_path), Classify(), batch=1024,
        epochs=epochs, warmup=5, scale=0.08, lr=4 * lr, final_lr=1e-6, layer_decay=decay, clip=0.0,
    )  # fmt: skip


def base_tune() -> Run:
    """Fine-tuning of MAE's ViT-B/16 on ImageNet-1k, 100 epochs (83.6 % in the original): GPUs.

    Command: ``multiway train mae.base_tune --data.root DIR --init DIR/final --out runs/mae_base_tune``. Not yet run by
    us.
    """
    return _tune("base_tune", "vit_base_patch16_224_mean", 100, 5e-4, 0.65, 0.1)


def large_tune() -> Run:
    """Fine-tuning of MAE's ViT-L/16 on ImageNet-1k, 50 epochs (85.9 % in the original): GPUs.

    Command: ``multiway train mae.large_tune --data.root DIR --init DIR/final --out runs/mae_large_tune``. Not yet run
    by us.
    """
    return _tune("large_tune", "vit_large_patch16_224_mean", 50, 1e-3, 0.75, 0.2)


def huge_tune() -> Run:
    """Fine-tuning of MAE's ViT-H/14 on ImageNet-1k, 50 epochs (86.9 % in the original): GPUs.

    Command: ``multiway train mae.huge_tune --data.root DIR --init DIR/final --out runs/mae_huge_tune``. Not yet run by
    us.
    """
    return _tune("huge_tune", "vit_huge_patch14_224_mean", 50, 1e-3, 0.75, 0.3)


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    if isinstance(run.objective, Classify):
        return pictures.classify(run, vit.ViT(pictures.with_classes(run.model)))
    model = mae.MAE(run.model)
    return mae.MaskedAutoencoding(model), pictures.hiding_collate(run, model, keep=True)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pictures.build(run, out, assemble)
