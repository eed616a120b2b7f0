"""Recipes of VQ-KD, the visual tokens of BEiT-2, made from a teacher's features (masked.md 4.2).

``multiway train vq_kd.NAME --data.root DIR --objective.teacher MODEL --out RUN`` trains one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pictures
from multiway.recipes.pictures import Distil
from multiway.run import Run
from multiway.systems import vit, vq_kd
from multiway.types import Batch, Objective


def quick() -> Run:
    """Visual tokens from any teacher, on embedded scenes or your pictures: two CPU cores, minutes.

    Command: ``multiway train vq_kd.quick --objective.teacher runs/mae/final --out runs/vq_kd``. Sizes and rates are
    ours. Not yet run by us.
    """
    return pictures.quick("vq_kd.quick", vq_kd.PRESETS["vqkd_encoder_micro_decoder_1x192x3"], Distil())


def base() -> Run:
    """Visual tokens from CLIP B/16 on ImageNet-1k, 100 epochs: GPUs.

    Command: ``multiway train vq_kd.base --data.root DIR --objective.teacher MODEL --out runs/vq_kd``. Not yet run by
    us. Source: masked.md 4.2: rate 5e-5 per 128.
    """
    return pictures.imagenet(
        "vq_kd.base", vq_kd.PRESETS["vqkd_encoder_base_decoder_3x768x12_clip"], Distil(), batch=512, epochs=100,
        warmup=10, scale=0.08, lr=2e-4, final_lr=1e-5, betas=(0.9, 0.99), weight_decay=1e-4,
    )  # fmt: skip


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches; to be rehearsed it needs no teacher."""
    teacher = pictures.teacher_of(run) if run.objective.teacher else vit.ViT(vit.PRESETS["vit_base_patch16_224"])
    return vq_kd.VectorQuantizedDistillation(vq_kd.VQKD(run.model), teacher), pictures.plain_collate()


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pictures.build(run, out, assemble)
