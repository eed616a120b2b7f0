"""Recipes of SimMIM: masked image modelling of any encoder, and its fine-tuning to classes (vision.md 7.2, 7.3).

``multiway train simmim.NAME --data.root DIR --out RUN`` trains one; fine-tuning (``_tune``) takes ``--init`` with what
pre-training left in ``RUN/final``. Rates in the source are per 512 pictures.
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
from multiway.systems import beit, simmim, swin, swin_v2
from multiway.types import Batch, Objective

CELLS = Hiding(scheme="cells", ratio=0.6, cell=32)


def quick() -> Run:
    """Masked image modelling of embedded scenes, or of your pictures: two CPU cores, minutes.

    Command: ``multiway train simmim.quick --out runs/simmim``, or with ``--data.root DIR``. Cells of 16 pixels of 64.
    Sizes and rates are ours. Not yet run by us.
    """
    model, hiding = simmim.PRESETS["simmim_vit_micro_patch4_32"], Hiding(scheme="cells", ratio=0.6, cell=16)
    return pictures.quick("simmim.quick", model, hiding)


def _pretrain(name: str, preset: str, epochs: int, lr: float, **schedule: object) -> Run:
    """Pre-training on ImageNet-1k (vision.md 7.3): batch 2048, 10 epochs of warm-up."""
    run = pictures.imagenet(
        f"simmim.{name}", simmim.PRESETS[preset], CELLS, batch=2048, epochs=epochs, warmup=10, scale=0.67, lr=4 * lr,
        final_lr=4e-5, interpolation="bilinear", clip=5.0,
    )  # fmt: skip
    return dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, **schedule))  # type: ignore[arg-type]


def swin_base_100() -> Run:
    """Masked image modelling of Swin-B on ImageNet-1k, 100 epochs: GPUs.

    Command: ``multiway train simmim.swin_base_100 --data.root DIR --out runs/simmim_swin``. Not yet run by us.
    """
    return _pretrain("swin_base_100", "simmim_swin_base_window6_192", 100, 2e-4, shape="late cosine", first_lr=4e-6)


def swin_base() -> Run:
    """Masked image modelling of Swin-B on ImageNet-1k, 800 epochs: GPUs.

    Command: ``multiway train simmim.swin_base --data.root DIR --out runs/simmim_swin``. Not yet run by us.
    """
    return _pretrain("swin_base", "simmim_swin_base_window6_192", 800, 1e-4, shape="step", first_lr=2e-6)


def swin_large() -> Run:
    """Masked image modelling of Swin-L on ImageNet-1k, 800 epochs: GPUs.

    Command: ``multiway train simmim.swin_large --data.root DIR --out runs/simmim_swin``. Not yet run by us.
    """
    return _pretrain("swin_large", "simmim_swin_large_window12_192", 800, 1e-4, shape="step", first_lr=2e-6)


def swinv2_base() -> Run:
    """Masked image modelling of Swin V2-B on ImageNet-1k with normalised targets, 800 epochs: GPUs.

    Command: ``multiway train simmim.swinv2_base --data.root DIR --out runs/simmim_swinv2``. Not yet run by us.
    """
    return _pretrain("swinv2_base", "simmim_swinv2_base_window12_192", 800, 1e-4, shape="step", first_lr=2e-6)


def vit_base() -> Run:
    """Masked image modelling of ViT-B/16 on ImageNet-1k, 800 epochs: GPUs.

    Command: ``multiway train simmim.vit_base --data.root DIR --out runs/simmim_vit``. Not yet run by us.
    """
    return _pretrain("vit_base", "simmim_vit_base_patch16_224", 800, 1e-4, shape="step", first_lr=2e-6)


def quick_tune() -> Run:
    """Fine-tuning of a quick encoder to the digit in embedded scenes, or your classes: two CPU cores, minutes.

    Command: ``multiway train simmim.quick_tune --init runs/simmim/final --out runs/simmim_tune``. Not yet run by us.
    """
    colours = simmim.PRESETS["simmim_vit_micro_patch4_32"]
    model = dataclasses.replace(beit.PRESETS["beit_micro_patch4_32"], mean=colours.mean, std=colours.std)
    return pictures.quick_tune("simmim.quick_tune", model)


def _tune(name: str, model: object, decay: float) -> Run:
    """Fine-tuning on ImageNet-1k (vision.md 7.3): 100 epochs, rate 1.25e-3 per 512."""
    return pictures.imagenet(
        f"simmim.{name}", model, Classify(), batch=2048, epochs=100, warmup=20, scale=0.08, lr=5e-3, first_lr=1e-6,
        final_lr=1e-6, layer_decay=decay, clip=5.0,
    )  # fmt: skip


def swin_base_tune() -> Run:
    """Fine-tuning of SimMIM's Swin-B on ImageNet-1k at 224 pixels, window 7 (84.0 % in the original): GPUs.

    Command: ``multiway train simmim.swin_base_tune --data.root DIR --init DIR/final --out runs/swin_tune``. Not yet run
    by us. From 100 epochs of pre-training the original takes ``--optim.layer_decay 0.9``.
    """
    model = dataclasses.replace(swin.PRESETS["swin_base_patch4_window7_224"], drop_path=0.1)
    return _tune("swin_base_tune", model, 0.8)


def swin_large_tune() -> Run:
    """Fine-tuning of SimMIM's Swin-L on ImageNet-1k at 224 pixels, window 14 (85.4 % in the original): GPUs.

    Command: ``multiway train simmim.swin_large_tune --data.root DIR --init DIR/final --out runs/swin_tune``. Not yet
    run by us.
    """
    model = dataclasses.replace(swin.PRESETS["swin_large_patch4_window7_224"], window=14, drop_path=0.2)
    return _tune("swin_large_tune", model, 0.7)


def vit_base_tune() -> Run:
    """Fine-tuning of SimMIM's ViT-B/16 on ImageNet-1k (83.8 % in the original): GPUs.

    Command: ``multiway train simmim.vit_base_tune --data.root DIR --init DIR/final --out runs/vit_tune``. Not yet run
    by us.
    """
    colours = simmim.PRESETS["simmim_vit_base_patch16_224"]
    model = dataclasses.replace(
        beit.PRESETS["beit_base_patch16_224"], mean=colours.mean, std=colours.std, drop_path=0.1
    )
    return _tune("vit_base_tune", model, 0.65)


CLASSIFIERS = {beit.Config: beit.BEiT, swin.Config: swin.Swin, swin_v2.Config: swin_v2.SwinV2}


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    if isinstance(run.objective, Classify):
        return pictures.classify(run, CLASSIFIERS[type(run.model)](pictures.with_classes(run.model)))
    model = simmim.SimMIM(run.model)
    return simmim.MaskedImageModeling(model), pictures.hiding_collate(run, model)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pictures.build(run, out, assemble)
