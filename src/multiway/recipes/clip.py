"""Recipes of CLIP: contrast of pictures and texts, from scratch.

``multiway train clip.NAME --out DIR`` trains one; every setting can be overridden (``multiway show clip.NAME``), and
``--init DIR`` tunes the weights of a folder. Figures of the published sizes are the paper's (masked.md 8.2, from memory
there); crops are open_clip's. A batch larger than the memory is trained with ``--parallel.micro N`` at equal maths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pairs, questions
from multiway.recipes.pairs import Contrast
from multiway.recipes.questions import Answer
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.systems.clip import CLIP, PRESETS
from multiway.tasks.retrieval import ImageTextContrast
from multiway.types import Batch, Objective

WIT, BATCH = 400_000_000, 32_768
"""Pairs of the paper's data, and in a step."""
EPOCHS = 32


def quick() -> Run:
    """Contrast on the embedded scenes: two CPU cores, minutes.

    Command: ``multiway train clip.quick --out runs/clip``, or with ``--data.root DIR``, any folder of pictures with
    captions. Sizes and rates are ours. Result at the commit that added this recipe, one thread of a busy machine, ten
    minutes: recall@1 among 1,000 scenes by other writers 76.5 % (picture to text) and 74.9 % (text to picture), chance
    0.1 %; their digit by name, never trained on, 56.5 %, chance 10 %.
    """
    return Run(
        recipe="clip.quick",
        model=PRESETS["clip_vit_tiny_patch8_64"],
        objective=Contrast(),
        data=Data(pairs=96, vocab=512, text_tokens=64, window=64, pair_scale=1.0, flip=False, jitter=0.0),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=600, warmup=100, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=300),
    )


def tiny() -> Run:
    """Contrast on a folder of your pictures with captions, in steps of 512 pairs whose activations are held 64 at a
    time: two CPU cores, hours.

    Command: ``multiway train clip.tiny --data.root DIR --out runs/clip_tiny``. Sizes and rates are ours. Not yet run
    by us.
    """
    return dataclasses.replace(
        quick(),
        recipe="clip.tiny",
        model=dataclasses.replace(
            PRESETS["clip_vit_tiny_patch8_64"], dim=192, depth=6, heads=3, hidden=768, patch=16, image_px=112,
            text_dim=192, text_depth=4, text_heads=3, text_hidden=768, vocab=8192,
        ),
        data=Data(pairs=512, vocab=8192, text_tokens=40, window=40, pair_scale=0.5, flip=False, jitter=0.0),
        schedule=Schedule(steps=3000, warmup=200, final_lr=2e-5),
        parallel=Parallel(precision="fp32", micro=8),
    )  # fmt: skip


def _published(name: str, model: str, lr: float, *, vit: bool = True, epochs: int = EPOCHS, **parallel: Any) -> Run:
    """The paper's training of one of its models on its own 400 M pairs (masked.md 8.2)."""
    epoch = WIT // BATCH
    return Run(
        recipe=f"clip.{name}",
        model=PRESETS[model],
        objective=Contrast(),
        data=Data(
            pairs=BATCH, vocab=49408, text_tokens=77, window=77, pair_scale=0.9, flip=False, jitter=0.0, workers=8
        ),
        optim=Optim(
            lr=lr, betas=(0.9, 0.98) if vit else (0.9, 0.999), eps=1e-6 if vit else 1e-8, weight_decay=0.2, clip=0.0
        ),
        schedule=Schedule(steps=epochs * epoch, warmup=2000, final_lr=0.0),
        parallel=Parallel(**parallel),
    )


def base_patch32() -> Run:
    """The paper's ViT-B/32: 64 or more GPUs.

    Command: ``torchrun ... -m multiway train clip.base_patch32 --data.root DIR --data.tokenizer
    bpe_simple_vocab_16e6.txt.gz --out runs/clip``. Not yet run by us.
    """
    return _published("base_patch32", "clip_vit_base_patch32_224", 5e-4)


def base_patch16() -> Run:
    """The paper's ViT-B/16: 64 or more GPUs.

    Command: ``torchrun ... -m multiway train clip.base_patch16``, the rest as base_patch32. Not yet run by us.
    """
    return _published("base_patch16", "clip_vit_base_patch16_224", 5e-4)


def large_patch14() -> Run:
    """The paper's ViT-L/14: 256 or more GPUs.

    Command: ``torchrun ... -m multiway train clip.large_patch14``, the rest as base_patch32. Not yet run by us.
    """
    return _published("large_patch14", "clip_vit_large_patch14_224", 4e-4, recompute=36)


def large_patch14_336() -> Run:
    """The paper's ViT-L/14@336: one more epoch of a large_patch14 model on larger pictures.

    Command: ``torchrun ... -m multiway train clip.large_patch14_336 --init DIR/final``, the rest as base_patch32. Not
    yet run by us.
    """
    return _published("large_patch14_336", "clip_vit_large_patch14_336", 2e-5, epochs=1, recompute=36)


def resnet50() -> Run:
    """The paper's RN50; its batch norms see the pictures of a process, so micro-batches are refused: GPUs.

    Command: ``torchrun ... -m multiway train clip.resnet50``, the rest as base_patch32. Not yet run by us.
    """
    return _published("resnet50", "clip_resnet50_224", 5e-4, vit=False)


def resnet101() -> Run:
    """The paper's RN101: GPUs.

    Command: ``torchrun ... -m multiway train clip.resnet101``, the rest as base_patch32. Not yet run by us.
    """
    return _published("resnet101", "clip_resnet101_224", 5e-4, vit=False)


def resnet50x4() -> Run:
    """The paper's RN50x4: GPUs.

    Command: ``torchrun ... -m multiway train clip.resnet50x4``, the rest as base_patch32. Not yet run by us.
    """
    return _published("resnet50x4", "clip_resnet50x4_288", 5e-4, vit=False)


def resnet50x16() -> Run:
    """The paper's RN50x16: GPUs.

    Command: ``torchrun ... -m multiway train clip.resnet50x16``, the rest as base_patch32. Not yet run by us.
    """
    return _published("resnet50x16", "clip_resnet50x16_384", 4e-4, vit=False)


def resnet50x64() -> Run:
    """The paper's RN50x64, which took 18 days on 592 V100s.

    Command: ``torchrun ... -m multiway train clip.resnet50x64``, the rest as base_patch32. Not yet run by us.
    """
    return _published("resnet50x64", "clip_resnet50x64_448", 3.6e-4, vit=False)


def open_clip() -> Run:
    """ViT-B/32 as open_clip trains it: GELU, 10,000 steps of warm-up, negatives without gradient through the gather.

    Command: ``torchrun ... -m multiway train clip.open_clip``, the rest as base_patch32. Not yet run by us. Source:
    masked.md 8.2, 1.9; the batch is the paper's.
    """
    run = _published("open_clip", "clip_vit_base_patch32_224_laion", 5e-4)
    schedule = dataclasses.replace(run.schedule, warmup=10_000)
    return dataclasses.replace(run, objective=Contrast(negatives="detached"), schedule=schedule)


def quick_text_classification() -> Run:
    """Classes of texts or of pairs of texts, by the text tower of a quick model: two CPU cores, minutes.

    Command: ``multiway train clip.quick_text_classification --init runs/clip/final --out runs/clip_text``, or with
    ``--data.root DIR``, see docs/questions.md. Not yet run by us.
    """
    run = questions.quick("clip.quick_text_classification", quick().model, "text_classification")
    return dataclasses.replace(run, data=dataclasses.replace(run.data, text_tokens=64, window=64))


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    if isinstance(run.objective, Answer):
        return questions.assemble(run, CLIP(questions.with_answers(run)), words)
    model = CLIP(run.model)
    return ImageTextContrast(model, run.objective.negatives), pairs.collate(run, words, model)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    if isinstance(run.objective, Answer):
        return questions.build(run, out, assemble)
    return pairs.build(run, out, assemble)
