"""Recipes of BEiT-3: masked pre-training in five sizes, contrastive tuning (``_itc``), retrieval (``_retrieval``),
captioning (``_captioning``), questions (``_vqa``, ``_nlvr2``, ``_entailment``, ``_text_classification``), classes of
pictures (``_classify``, ``_imagenet``).

``multiway train beit3.NAME --out DIR`` trains one; every setting can be overridden (``multiway show beit3.NAME``).
Figures of base, large and giant are the paper's and the released code's (masked.md 6.5, 7.1); the batch is theirs as
well: 2048 pictures, 2048 texts and 2048 pairs in every step. Image targets are codes of a k-means patch codebook,
unless ``--objective.tokenizer DIR`` names the paper's, BEiT-2's VQ-KD (``vq_kd.*`` trains one).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from multiway import evaluation
from multiway.data.collate import MaskedCollate, Samples, Words
from multiway.engine.train import Job
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from multiway.pretrained import Pretrained
from multiway.recipes import captioning, pairs, pictures, questions
from multiway.recipes.captioning import Caption
from multiway.recipes.pairs import Contrast
from multiway.recipes.pictures import Classify
from multiway.recipes.questions import Answer
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule
from multiway.systems.beit3 import PRESETS, BEiT3, Config, MaskedAndContrast, MaskedDataModeling
from multiway.tasks.retrieval import ImageTextContrast
from multiway.types import Batch, Objective


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Masked data modelling. Ratios: share of patches, of words of texts, and of words of pairs that are hidden.
    ``weights``: of the losses ``image pair_image pair_text text contrast``, 1 where not named. ``tokenizer``: folder of
    a VQ-KD, as in the paper, or file, folder or hub id of DALL-E's encoder, None = mean patches, fitted by k-means
    before training; ``views``: of each picture whose codes are stored before training, 0 = codes are computed while
    training. ``contrast``: also match pictures and texts apart; then the share ``joint`` of a step's pairs is read
    jointly."""

    image_ratio: float = 0.4
    text_ratio: float = 0.15
    pair_ratio: float = 0.5
    weights: dict[str, float] = field(default_factory=dict)
    tokenizer: str | None = None
    views: int = 0
    contrast: bool = False
    joint: float = 1.0


# ---------------------------------------------------------------------------------------------------- pre-training


def quick() -> Run:
    """Masked data modelling and contrast on the embedded scenes: two CPU cores, three minutes; `make quickstart`
    runs it.

    Command: ``multiway train beit3.quick --out runs/quick``. Data: handwritten digits in generated scenes, made on the
    spot; or ``--data.root DIR``, any folder of pictures with captions. Sizes and rates are ours, found by prototypes:
    narrow, few layers, wide initial weights, and Muon, whose 800 steps reach further than AdamW's 1,500. Result: see
    the README's table, which names the commit.
    """
    return Run(
        recipe="beit3.quick",
        model=PRESETS["beit3_tiny_patch16_64"],
        objective=Masked(
            views=1, contrast=True, joint=1 / 3,
            weights={"image": 0.1, "pair_image": 0.3, "pair_text": 0.3, "text": 0.1},
        ),
        data=Data(
            images=8, texts=8, pairs=96, vocab=512, text_tokens=64, window=64,
            image_scale=1.0, pair_scale=1.0, flip=False, jitter=0.0,
        ),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=1000, warmup=100, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=500),
    )  # fmt: skip


def photos() -> Run:
    """Masked data modelling and contrast on a folder of your pictures with captions: two CPU cores, under an hour.

    Command: ``multiway train beit3.photos --data.root DIR --out runs/photos``. Sizes and rates are ours. Result: with
    ``--steps 500`` see the README's table, which names the commit; the full 1,500 steps are not yet run by us.
    """
    return Run(
        recipe="beit3.photos",
        model=Config(
            dim=160, depth=4, heads=5, hidden=480, image_px=96, vocab=4096, text_positions=66, codes=1024,
            drop_path=0.05, contrast=True, init_std=0.1,
        ),
        objective=Masked(views=4, contrast=True, joint=0.25),
        data=Data(images=32, texts=32, pairs=128, vocab=4096, text_tokens=40, window=40, image_scale=0.4, jitter=0.2),
        optim=Optim(lr=1e-3, matrices="muon", weight_decay=0.1),
        schedule=Schedule(steps=1500, warmup=100),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=250),
        log=Log(evaluate=500),
    )  # fmt: skip


def small() -> Run:
    """Masked data modelling for one GPU and hours.

    Command: ``multiway train beit3.small --data.root DIR --out runs/small``. Not yet run by us. The batch is a
    sixteenth of the paper's and the rate its square-root share (masked.md 7.2, choice 24); the schedule is ours.
    """
    return Run(
        recipe="beit3.small",
        model=PRESETS["beit3_small_patch16_224"],
        objective=Masked(),
        data=Data(images=128, texts=128, pairs=128, window=128, workers=8),
        optim=Optim(lr=2.5e-4),
        schedule=Schedule(steps=100_000, warmup=2_000),
    )


def base() -> Run:
    """The paper's pre-training at the released base size (decoupled): 8 or more GPUs.

    Command: ``torchrun --nproc-per-node 8 -m multiway train beit3.base --data.root DIR --out runs/base``. Not yet
    run by us. Source: masked.md 7.1; precision, crops and text lengths from 7.2.
    """
    return Run(
        recipe="beit3.base",
        model=PRESETS["beit3_base_patch16_224"],
        objective=Masked(),
        data=Data(images=2048, texts=2048, pairs=2048, workers=8),
        parallel=Parallel(micro=8),
    )


def large() -> Run:
    """The paper's pre-training at the released large size (decoupled): 32 or more GPUs.

    Command: ``torchrun ... -m multiway train beit3.large --data.root DIR --out runs/large``. Not yet run by us.
    Source: as base.
    """
    parallel = Parallel(micro=8, recompute=24)
    return dataclasses.replace(
        base(), recipe="beit3.large", model=PRESETS["beit3_large_patch16_224"], parallel=parallel
    )


def giant() -> Run:
    """The paper's giant, with shared attention and vision-language experts in the top 3 layers: 64 or more GPUs.

    Command: ``torchrun ... -m multiway train beit3.giant --data.root DIR --out runs/giant``. Not yet run by us.
    Source: masked.md 6.1, 7.1.
    """
    parallel = Parallel(micro=8, recompute=40)
    return dataclasses.replace(
        base(), recipe="beit3.giant", model=PRESETS["beit3_giant_patch14_224"], parallel=parallel
    )


# ------------------------------------------------------------------------------------- contrastive tuning, retrieval


def _contrast(run: Run, name: str, drop_path: float, **changes: Any) -> Run:
    """A run that tunes ``run``'s model with contrast: no masked heads, pairs alone."""
    model = dataclasses.replace(run.model, masked=False, contrast=True, drop_path=drop_path)
    return dataclasses.replace(run, recipe=f"beit3.{name}", model=model, objective=Contrast(), **changes)


def _itc(run: Run, decay: float, pairs: int, steps: int, warmup: int) -> Run:
    """Contrastive tuning: rate, decay and drop path of the paper's giant (masked.md 6.5), which the released files
    share.
    """
    return _contrast(
        run, f"{run.recipe.split('.')[1]}_itc", 0.3,
        data=dataclasses.replace(run.data, images=0, texts=0, pairs=pairs),
        optim=Optim(lr=3e-5, betas=(0.9, 0.999), eps=1e-8, layer_decay=decay, clip=0.0),
        schedule=Schedule(steps=steps, warmup=warmup, final_lr=1e-6),
        parallel=dataclasses.replace(run.parallel, micro=1),
    )  # fmt: skip


def _retrieval(run: Run, lr: float, decay: float, drop_path: float, pairs: int = 3072) -> Run:
    """Fine-tuning for COCO retrieval as released (masked.md 6.5): 384 px, 15 epochs of 113,287 pictures, 3 of
    warm-up.
    """
    itc = _contrast(run, f"{run.recipe.split('.')[1]}_retrieval", drop_path)
    epoch = round(113_287 / pairs)
    return dataclasses.replace(
        itc,
        model=dataclasses.replace(itc.model, image_px=384 // run.model.patch * run.model.patch),
        data=dataclasses.replace(run.data, images=0, texts=0, pairs=pairs, jitter=0.0),
        optim=Optim(lr=lr, betas=(0.9, 0.999), eps=1e-8, layer_decay=decay, clip=0.0),
        schedule=Schedule(steps=15 * epoch, warmup=3 * epoch, final_lr=1e-6),
        parallel=dataclasses.replace(run.parallel, micro=1),
    )


def quick_itc() -> Run:
    """Contrastive tuning of a quick model: two CPU cores, minutes.

    Command: ``multiway train beit3.quick_itc --init DIR/final --out runs/quick_itc``. Not yet run by us.
    """
    run = _itc(quick(), decay=1.0, pairs=128, steps=600, warmup=60)
    model = dataclasses.replace(run.model, drop_path=0.0)
    optim, schedule = Optim(lr=2e-3, matrices="muon"), Schedule(steps=600, warmup=60)
    return dataclasses.replace(run, model=model, optim=optim, schedule=schedule)


def quick_retrieval() -> Run:
    """Retrieval fine-tuning of a quick model on your own pairs: two CPU cores, minutes.

    Command: ``multiway train beit3.quick_retrieval --data.root DIR --init DIR/final --out runs/quick_retrieval``.
    Not yet run by us.
    """
    run = quick_itc()
    data = dataclasses.replace(run.data, pair_scale=0.5)
    optim = Optim(lr=1e-3, matrices="muon", layer_decay=0.85)
    return dataclasses.replace(run, recipe="beit3.quick_retrieval", data=data, optim=optim)


def small_itc() -> Run:
    """Contrastive tuning of a small model: one GPU.

    Command: ``multiway train beit3.small_itc --data.root DIR --init DIR/final --out runs/small_itc``. Not yet run by
    us.
    """
    return _itc(small(), decay=0.95, pairs=1024, steps=20_000, warmup=1_000)


def base_itc() -> Run:
    """Contrastive tuning of a base model, 5 epochs of 21 M pairs, 1 of warm-up: GPUs.

    Command: ``multiway train beit3.base_itc --data.root DIR --init DIR/final --out runs/base_itc``. Not yet run by us.
    """
    return _itc(base(), decay=0.95, pairs=16384, steps=6_400, warmup=1_280)


def large_itc() -> Run:
    """Contrastive tuning of a large model: GPUs.

    Command: ``multiway train beit3.large_itc --data.root DIR --init DIR/final --out runs/large_itc``. Not yet run by
    us.
    """
    return _itc(large(), decay=0.95, pairs=16384, steps=6_400, warmup=1_280)


def giant_itc() -> Run:
    """Contrastive tuning of a giant model, every figure the paper's: GPUs.

    Command: ``multiway train beit3.giant_itc --data.root DIR --init DIR/final --out runs/giant_itc``. Not yet run by
    us.
    """
    return _itc(giant(), decay=0.95, pairs=16384, steps=6_400, warmup=1_280)


def small_retrieval() -> Run:
    """Retrieval fine-tuning of a small model with base's settings, a smaller batch: one GPU.

    Command: ``multiway train beit3.small_retrieval --data.root DIR --init DIR/final --out runs/small_retrieval``.
    Not yet run by us.
    """
    return _retrieval(small(), lr=2e-4, decay=0.65, drop_path=0.2, pairs=768)


def base_retrieval() -> Run:
    """Retrieval fine-tuning of a base ``_itc`` model on COCO: GPUs.

    Command: ``multiway train beit3.base_retrieval --data.root DIR --init DIR/final --out runs/base_retrieval``. Not
    yet run by us.
    """
    return _retrieval(base(), lr=2e-4, decay=0.65, drop_path=0.2)


def large_retrieval() -> Run:
    """Retrieval fine-tuning of a large ``_itc`` model on COCO: GPUs.

    Command: ``multiway train beit3.large_retrieval --data.root DIR --init DIR/final --out runs/large_retrieval``.
    Not yet run by us.
    """
    return _retrieval(large(), lr=5e-5, decay=0.85, drop_path=0.2)


def giant_retrieval() -> Run:
    """Retrieval fine-tuning of a giant model on COCO; the paper reads 420 px, here 378: GPUs.

    Command: ``multiway train beit3.giant_retrieval --data.root DIR --init DIR/final --out runs/giant_retrieval``.
    Not yet run by us.
    """
    return _retrieval(giant(), lr=1e-5, decay=0.95, drop_path=0.3)


# ------------------------------------------------------------------------------------------------------ captioning


def quick_captioning() -> Run:
    """Captions of your own pictures, from scratch or from a photos model: one CPU core, ten minutes.

    Command: ``multiway train beit3.quick_captioning --data.root DIR --out runs/captioning``. Sizes and rates are ours.
    Result: see the table of docs/captioning.md, which names the commit.
    """
    run = photos()
    return dataclasses.replace(
        run, recipe="beit3.quick_captioning", objective=Caption(),
        model=dataclasses.replace(run.model, codes=0, contrast=False),
        data=dataclasses.replace(run.data, images=0, texts=0, pairs=64, text_tokens=32, jitter=0.0),
        optim=Optim(lr=3e-3, matrices="muon", weight_decay=0.1),
        schedule=Schedule(steps=1500, warmup=100),
        log=Log(),
    )  # fmt: skip


def base_captioning() -> Run:
    """Captioning by a base model, tuned on COCO as released: GPUs.

    Command: ``multiway train beit3.base_captioning --data.root DIR --init DIR/final --out runs/base_captioning``. Not
    yet run by us.
    """
    return captioning.tuned(base(), "beit3.base_captioning", lr=4e-5)


def large_captioning() -> Run:
    """Captioning by a large model, tuned on COCO as released: GPUs.

    Command: ``multiway train beit3.large_captioning --data.root DIR --init DIR/final --out runs/large_captioning``.
    Not yet run by us.
    """
    return captioning.tuned(large(), "beit3.large_captioning", lr=8e-6)


# ------------------------------------------------------------------------------------------------------- questions


def _asked(run: Run, **changes: Any) -> Run:
    """A run whose model carries nothing but what reads."""
    model = dataclasses.replace(run.model, masked=False, contrast=False, codes=0, **changes)
    return dataclasses.replace(run, model=model)


def quick_vqa() -> Run:
    """Questions about pictures, answered by a quick model: two CPU cores, minutes.

    Command: ``multiway train beit3.quick_vqa --init runs/quick/final --out runs/vqa``, or with ``--data.root DIR``, see
    docs/questions.md. Result: see there, with the commit.
    """
    return questions.quick("beit3.quick_vqa", _asked(quick()).model, "vqa")


def quick_nlvr2() -> Run:
    """Whether a statement is true of two pictures, or of one: two CPU cores, minutes.

    Command: ``multiway train beit3.quick_nlvr2 --init runs/vqa/final --out runs/nlvr2``, after quick_vqa, or with
    ``--data.root DIR``. Result: see docs/questions.md, which names the commit.
    """
    run = questions.quick("beit3.quick_nlvr2", _asked(quick(), pictures=2).model, "nlvr2")
    optim, schedule = dataclasses.replace(run.optim, lr=1e-3), dataclasses.replace(run.schedule, steps=1500)
    return dataclasses.replace(run, optim=optim, schedule=schedule)


def quick_entailment() -> Run:
    """Whether a picture entails a text, contradicts it, or neither: two CPU cores, minutes.

    Command: ``multiway train beit3.quick_entailment --init runs/quick/final --out runs/entailment``, or with
    ``--data.root DIR``. Result: see docs/questions.md, which names the commit.
    """
    return questions.quick("beit3.quick_entailment", _asked(quick()).model, "entailment")


def quick_text_classification() -> Run:
    """Classes of texts or of pairs of texts, by the language half of a quick model: two CPU cores, minutes.

    Command: ``multiway train beit3.quick_text_classification --init runs/quick/final --out runs/text``, or with
    ``--data.root DIR``. Result: see docs/questions.md, which names the commit.
    """
    return questions.quick("beit3.quick_text_classification", _asked(quick(), pictures=0).model, "text_classification")


def _vqa(run: Run, lr: float, drop_path: float) -> Run:
    """Tuning on VQAv2 as released (masked.md 6.5): 480 px, 10 epochs, 1 of warm-up, the head at 20 times the rate."""
    name = f"beit3.{run.recipe.split('.')[1]}_vqa"
    return questions.tuned(
        _asked(run), name, Answer(task="vqa", augment=True), px=480, batch=128, questions=questions.VQA, epochs=10,
        warmup=1, drop_path=drop_path, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, head=20.0,
    )  # fmt: skip


def _nlvr2(run: Run, lr: float, decay: float) -> Run:
    """Tuning on NLVR2 as released (masked.md 6.5): 224 px, 20 epochs, 5 of warm-up."""
    name = f"beit3.{run.recipe.split('.')[1]}_nlvr2"
    return questions.tuned(
        _asked(run, pictures=2), name, Answer(task="nlvr2"), px=224, batch=256, questions=questions.NLVR2, epochs=20,
        warmup=5, drop_path=0.2, lr=lr, layer_decay=decay, weight_decay=0.2,
    )  # fmt: skip


def base_vqa() -> Run:
    """Visual question answering by a base model, tuned on VQAv2 as released: GPUs.

    Command: ``multiway train beit3.base_vqa --data.root DIR --init DIR/final --out runs/base_vqa``. Not yet run by us.
    """
    return _vqa(base(), 3e-5, 0.1)


def large_vqa() -> Run:
    """Visual question answering by a large model, tuned on VQAv2 as released: GPUs.

    Command: ``multiway train beit3.large_vqa --data.root DIR --init DIR/final --out runs/large_vqa``. Not yet run by
    us.
    """
    return _vqa(large(), 2e-5, 0.15)


def base_nlvr2() -> Run:
    """Statements about two pictures, judged by a base model, tuned on NLVR2 as released: GPUs.

    Command: ``multiway train beit3.base_nlvr2 --data.root DIR --init DIR/final --out runs/base_nlvr2``. Not yet run by
    us.
    """
    return _nlvr2(base(), 7e-4, 0.65)


def large_nlvr2() -> Run:
    """Statements about two pictures, judged by a large model, tuned on NLVR2 as released: GPUs.

    Command: ``multiway train beit3.large_nlvr2 --data.root DIR --init DIR/final --out runs/large_nlvr2``. Not yet run
    by us.
    """
    return _nlvr2(large(), 3e-4, 0.85)


# ------------------------------------------------------------------------------------------- classes, from vision alone


def quick_classify() -> Run:
    """Classification by the vision half of a quick model: two CPU cores, minutes.

    Command: ``multiway train beit3.quick_classify --init runs/quick/final --out runs/classify``, or with
    ``--data.root DIR``, pictures in folders named after their class. Not yet run by us.
    """
    model = dataclasses.replace(quick().model, masked=False, contrast=False)
    return dataclasses.replace(pictures.quick_tune("beit3.quick_classify", model), model=model)


def _imagenet(name: str, model: Config, lr: float, decay: float, drop_path: float) -> Run:
    """Fine-tuning on ImageNet-1k as released (masked.md 6.5): 50 epochs of batch 1024, 5 of warm-up."""
    model = dataclasses.replace(
        model, masked=False, classes=1000, mean=IMAGENET_MEAN, std=IMAGENET_STD, share=1.0, drop_path=drop_path
    )
    return pictures.imagenet(
        f"beit3.{name}", model, Classify(), batch=1024, epochs=50, warmup=5, scale=0.08, lr=lr, final_lr=1e-6,
        layer_decay=decay, clip=0.0,
    )  # fmt: skip


def base_imagenet() -> Run:
    """Classification of ImageNet-1k by the vision half of a base model: GPUs.

    Command: ``multiway train beit3.base_imagenet --data.root DIR --init DIR/final --out runs/base_imagenet``. Not yet
    run by us.
    """
    return _imagenet("base_imagenet", PRESETS["beit3_base_patch16_224"], 7e-4, 0.65, 0.15)


def large_imagenet() -> Run:
    """Classification of ImageNet-1k by the vision half of a large model: GPUs.

    Command: ``multiway train beit3.large_imagenet --data.root DIR --init DIR/final --out runs/large_imagenet``. Not yet
    run by us.
    """
    return _imagenet("large_imagenet", PRESETS["beit3_large_patch16_224"], 2e-4, 0.8, 0.25)


# ------------------------------------------------------------------------------------------------- from run to job


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches; its tokenizer comes with `build`."""
    settings = run.objective
    if isinstance(settings, Classify):
        return pictures.classify(run, BEiT3(pictures.with_classes(run.model)))
    if isinstance(settings, Answer):
        return questions.assemble(run, BEiT3(questions.with_answers(run)), words)
    model = BEiT3(run.model)
    if isinstance(settings, Contrast):
        return ImageTextContrast(model, settings.negatives), pairs.collate(run, words, model)
    if isinstance(settings, Caption):
        return captioning.assemble(run, model, words, pictures.branches(model))
    kind = MaskedAndContrast if settings.contrast else MaskedDataModeling
    return kind(model, pictures.no_tokenizer(run), settings.weights), MaskedCollate(
        words=words, grid=run.model.grid, branches=pictures.branches(model), contrast=settings.contrast,
        joint=settings.joint, image_ratio=settings.image_ratio, text_ratio=settings.text_ratio,
        pair_ratio=settings.pair_ratio,
    )  # fmt: skip


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs; what has to be made once (index, image tokenizer, stored views) is kept below
    ``out``.
    """
    if isinstance(run.objective, Classify):
        return pictures.build(run, out, assemble)
    if isinstance(run.objective, Answer):
        return questions.build(run, out, assemble)
    tokenizer_of = pictures.tokenizer_of if isinstance(run.objective, Masked) else None
    return pairs.build(run, out, assemble, tokenizer_of, partial(figures, run=run, out=out))


def figures(ready: Pretrained, objective: Any, collate: Any, *, run: Run, out: Path) -> dict[str, Any]:
    """Retrieval of a model that compares, captions of one that writes, and of embedded scenes what is filled in."""
    found = pairs.figures(ready, run, out) if run.model.contrast else {}
    if isinstance(run.objective, Caption):
        found |= captioning.figures(ready, run, out)
    pictured = run.data.images or run.data.pairs
    if isinstance(run.objective, Masked) and run.data.root is None and pictured:
        hiding = dataclasses.replace(collate, branches=0, contrast=False)
        found["masked"] = evaluation.filling_of_scenes(ready, objective.tokenizer, hiding, run.seed)
    return found
