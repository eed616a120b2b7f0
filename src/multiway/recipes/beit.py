"""Recipes of BEiT: masked image modelling of visual tokens, and fine-tuning to classes (masked.md 2.2, 2.3).

``multiway train beit.NAME --data.root DIR --out RUN`` trains one; fine-tuning (``_tune``) takes ``--init`` with what
pre-training left in ``RUN/final``, or converted weights. The original's visual tokens are DALL-E's
(``--objective.tokenizer facebook/flava-image-codebook``); else they are mean patches, or those of a VQ-KD.
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
from multiway.systems import beit
from multiway.types import Batch, Objective

BLOCKS = Codes(scheme="blocks", ratio=75 / 196)
IMAGENET_22K = 14_197_122


def quick() -> Run:
    """Masked image modelling of embedded scenes, or of your pictures: two CPU cores, minutes.

    Command: ``multiway train beit.quick --out runs/beit``, or with ``--data.root DIR``. Sizes and rates are ours. Not
    yet run by us.
    """
    model = beit.PRESETS["beit_micro_patch4_32_pt"]
    return pictures.quick("beit.quick", model, Codes(scheme="blocks", ratio=0.4, views=4))


def base() -> Run:
    """Masked image modelling of ViT-B/16 on ImageNet-1k, 800 epochs: GPUs.

    Command: ``multiway train beit.base --data.root DIR --out runs/beit_base``. Not yet run by us. Source: masked.md
    2.2.
    """
    model = dataclasses.replace(beit.PRESETS["beit_base_patch16_224_pt22k"], drop_path=0.1)
    return pictures.imagenet(
        "beit.base", model, BLOCKS, batch=2048, epochs=800, warmup=10, scale=0.08, lr=1.5e-3, final_lr=1e-5,
        jitter=0.4, clip=3.0,
    )  # fmt: skip


def base_22k() -> Run:
    """Masked image modelling of ViT-B/16 on ImageNet-22k, 150 epochs: GPUs.

    Command: ``multiway train beit.base_22k --data.root DIR --out runs/beit_base``. Not yet run by us. Source: masked.md
    2.2; 10,000 steps of warm-up.
    """
    run = base()
    steps = 150 * IMAGENET_22K // 2048
    schedule = dataclasses.replace(run.schedule, steps=steps, warmup=10_000)
    return dataclasses.replace(run, recipe="beit.base_22k", schedule=schedule)


def large_22k() -> Run:
    """Masked image modelling of ViT-L/16 on ImageNet-22k, 150 epochs: GPUs.

    Command: ``multiway train beit.large_22k --data.root DIR --out runs/beit_large``. Not yet run by us. Source: as
    base_22k; the gradient is clipped at 1.
    """
    run = base_22k()
    model = dataclasses.replace(beit.PRESETS["beit_large_patch16_224_pt22k"], drop_path=0.1)
    optim = dataclasses.replace(run.optim, clip=1.0)
    return dataclasses.replace(run, recipe="beit.large_22k", model=model, optim=optim)


def quick_tune() -> Run:
    """Fine-tuning of a quick encoder to the digit in embedded scenes, or your classes: two CPU cores, minutes.

    Command: ``multiway train beit.quick_tune --init runs/beit/final --out runs/beit_tune``. Not yet run by us.
    """
    return pictures.quick_tune("beit.quick_tune", beit.PRESETS["beit_micro_patch4_32"])


def base_tune() -> Run:
    """Fine-tuning of BEiT's ViT-B/16 on ImageNet-1k, 100 epochs (83.2 % in the original): GPUs.

    Command: ``multiway train beit.base_tune --data.root DIR --init DIR/final --out runs/beit_tune``. Not yet run by us.
    Source: masked.md 2.3.
    """
    model = dataclasses.replace(beit.PRESETS["beit_base_patch16_224"], drop_path=0.1)
    return pictures.imagenet(
        "beit.base_tune", model, Classify(), batch=1024, epochs=100, warmup=20, scale=0.08, lr=4e-3, final_lr=1e-6,
        layer_decay=0.65, clip=0.0,
    )  # fmt: skip


def large_tune() -> Run:
    """Fine-tuning of BEiT's ViT-L/16 on ImageNet-1k, 50 epochs (86.0 % in the original): GPUs.

    Command: ``multiway train beit.large_tune --data.root DIR --init DIR/final --out runs/beit_tune``. Not yet run by
    us. Source: masked.md 2.3.
    """
    model = dataclasses.replace(beit.PRESETS["beit_large_patch16_224"], drop_path=0.2)
    return pictures.imagenet(
        "beit.large_tune", model, Classify(), batch=1024, epochs=50, warmup=5, scale=0.08, lr=1e-3, final_lr=1e-6,
        layer_decay=0.75, clip=0.0,
    )  # fmt: skip


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches; its tokenizer comes with `build`."""
    if isinstance(run.objective, Classify):
        return pictures.classify(run, beit.BEiT(pictures.with_classes(run.model)))
    model = beit.BEiT(run.model)
    return beit.MaskedImageModeling(model, pictures.no_tokenizer(run)), pictures.hiding_collate(run, model)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    predicts_codes = isinstance(run.objective, Codes)
    return pictures.build(run, out, assemble, pictures.tokenizer_of if predicts_codes else None)
