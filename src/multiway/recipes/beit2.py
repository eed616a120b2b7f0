"""Recipes of BEiT-2: masked image modelling of VQ-KD's visual tokens, and fine-tuning (masked.md 4.3, 4.4).

``multiway train beit2.NAME --data.root DIR --objective.tokenizer VQ_KD --out RUN`` trains one (`multiway.recipes.vq_kd`
trains the tokenizer); fine-tuning (``_tune``) takes ``--init`` with what pre-training left in ``RUN/final``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pictures
from multiway.recipes.pictures import Classify, Codes
from multiway.run import Run
from multiway.systems import beit, beit2
from multiway.types import Batch, Objective

BLOCKS = Codes(scheme="blocks", ratio=75 / 196)


def quick() -> Run:
    """Masked image modelling with patch aggregation, embedded scenes or your pictures: two CPU cores, minutes.

    Command: ``multiway train beit2.quick --objective.tokenizer runs/vq_kd/final --out runs/beit2``, or without a
    tokenizer, with mean patches. Sizes and rates are ours. Not yet run by us.
    """
    model = beit2.PRESETS["beit2_micro_patch4_32_pt"]
    return pictures.quick("beit2.quick", model, Codes(scheme="blocks", ratio=0.4, views=4))


def base() -> Run:
    """Masked image modelling of ViT-B/16 on ImageNet-1k, 1600 epochs: GPUs.

    Command: ``multiway train beit2.base --data.root DIR --objective.tokenizer VQ_KD --out runs/beit2_base``. Not yet
    run by us. Source: masked.md 4.3.
    """
    return pictures.imagenet(
        "beit2.base", beit2.PRESETS["beit2_base_patch16_224_pt1k"], BLOCKS, batch=2048, epochs=1600, warmup=10,
        scale=0.2, lr=1.5e-3, final_lr=1e-5, jitter=0.4, clip=3.0,
    )  # fmt: skip


def base_300() -> Run:
    """Masked image modelling of ViT-B/16 on ImageNet-1k, 300 epochs: GPUs.

    Command: ``multiway train beit2.base_300 --data.root DIR --objective.tokenizer VQ_KD --out runs/beit2_base``. Not
    yet run by us. Source: masked.md 4.3: no stochastic depth, betas .9 and .98.
    """
    model = dataclasses.replace(beit2.PRESETS["beit2_base_patch16_224_pt1k"], drop_path=0.0)
    return pictures.imagenet(
        "beit2.base_300", model, BLOCKS, batch=2048, epochs=300, warmup=10, scale=0.2, lr=1.5e-3, final_lr=1e-5,
        jitter=0.4, clip=3.0, betas=(0.9, 0.98),
    )  # fmt: skip


def large() -> Run:
    """Masked image modelling of ViT-L/16 on ImageNet-1k, 1600 epochs: GPUs.

    Command: ``multiway train beit2.large --data.root DIR --objective.tokenizer VQ_KD --out runs/beit2_large``. Not yet
    run by us. Source: as base.
    """
    return dataclasses.replace(base(), recipe="beit2.large", model=beit2.PRESETS["beit2_large_patch16_224_pt1k"])


def quick_tune() -> Run:
    """Fine-tuning of a quick encoder to the digit in embedded scenes, or your classes: two CPU cores, minutes.

    Command: ``multiway train beit2.quick_tune --init runs/beit2/final --out runs/beit2_tune``. Not yet run by us.
    """
    colours = beit2.PRESETS["beit2_micro_patch4_32_pt"]
    model = dataclasses.replace(beit.PRESETS["beit_micro_patch4_32"], mean=colours.mean, std=colours.std)
    return pictures.quick_tune("beit2.quick_tune", model)


def _tune(name: str, preset: str, epochs: int, warmup: int, lr: float, decay: float) -> Run:
    """Fine-tuning of the 1600-epoch models on ImageNet-1k (masked.md 4.4)."""
    return pictures.imagenet(
        f"beit2.{name}", dataclasses.replace(beit.PRESETS[preset], drop_path=0.2), Classify(), batch=1024,
        epochs=epochs, warmup=warmup, scale=0.08, lr=lr, final_lr=1e-6, layer_decay=decay, clip=0.0,
    )  # fmt: skip


def base_tune() -> Run:
    """Fine-tuning of BEiT-2's ViT-B/16 on ImageNet-1k, 100 epochs (85.5 % in the original): GPUs.

    Command: ``multiway train beit2.base_tune --data.root DIR --init DIR/final --out runs/beit2_tune``. Not yet run by
    us.
    """
    return _tune("base_tune", "beit2_base_patch16_224", 100, 20, 5e-4, 0.6)


def large_tune() -> Run:
    """Fine-tuning of BEiT-2's ViT-L/16 on ImageNet-1k, 50 epochs (87.3 % in the original): GPUs.

    Command: ``multiway train beit2.large_tune --data.root DIR --init DIR/final --out runs/beit2_tune``. Not yet run by
    us.
    """
    return _tune("large_tune", "beit2_large_patch16_224", 50, 5, 2e-4, 0.8)


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches; its tokenizer comes with `build`."""
    if isinstance(run.objective, Classify):
        return pictures.classify(run, beit.BEiT(pictures.with_classes(run.model)))
    model = beit2.BEiT2(run.model)
    return beit2.PatchAggregation(model, pictures.no_tokenizer(run)), pictures.hiding_collate(run, model)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    predicts_codes = isinstance(run.objective, Codes)
    return pictures.build(run, out, assemble, pictures.tokenizer_of if predicts_codes else None)
