"""Recipes of SigLIP: every pair of a picture and a text judged on its own, from scratch.

``multiway train siglip.NAME --out DIR`` trains one; every setting can be overridden (``multiway show siglip.NAME``),
and ``--init DIR`` tunes the weights of a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pairs, questions
from multiway.recipes.pairs import Contrast
from multiway.recipes.questions import Answer
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.systems.siglip import PRESETS, SigLIP
from multiway.tasks.retrieval import ImageTextSigmoid
from multiway.types import Batch, Objective


def quick() -> Run:
    """Sigmoid contrast on the embedded scenes: two CPU cores, minutes.

    Command: ``multiway train siglip.quick --out runs/siglip``, or with ``--data.root DIR``, any folder of pictures with
    captions. Sizes and rates are ours. Result at the commit that added this recipe, one thread of a busy machine, six
    minutes: recall@1 among 1,000 scenes by other writers 61.4 % (picture to text) and 61.9 % (text to picture), chance
    0.1 %; their digit by name, never trained on, 21.7 %, chance 10 %.
    """
    return Run(
        recipe="siglip.quick",
        model=PRESETS["siglip_tiny_patch8_64"],
        objective=Contrast(),
        data=Data(pairs=96, vocab=512, text_tokens=32, window=32, pair_scale=1.0, flip=False, jitter=0.0),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=600, warmup=100, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=300),
    )


def base() -> Run:
    """The paper's base size on 9 billion pairs: TPUs there, GPUs here.

    Command: ``torchrun ... -m multiway train siglip.base --data.root DIR --data.tokenizer tokenizer.json --out
    runs/siglip``. Not yet run by us. Batch, rate, decay, betas and clipping are the paper's from memory, for which
    big_vision publishes no configuration; the warm-up is ours.
    """
    return Run(
        recipe="siglip.base",
        model=PRESETS["siglip_base_patch16_224"],
        objective=Contrast(),
        data=Data(
            pairs=32_768, vocab=32_000, text_tokens=64, window=64, pair_scale=0.9, flip=False, jitter=0.0, workers=8
        ),
        optim=Optim(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4, clip=1.0),
        schedule=Schedule(steps=9_000_000_000 // 32_768, warmup=10_000, final_lr=0.0),
    )


def quick_text_classification() -> Run:
    """Classes of texts or of pairs of texts, by the text tower of a quick model: two CPU cores, minutes.

    Command: ``multiway train siglip.quick_text_classification --init runs/siglip/final --out runs/siglip_text``, or
    with ``--data.root DIR``, see docs/questions.md. Not yet run by us.
    """
    run = questions.quick("siglip.quick_text_classification", quick().model, "text_classification")
    return dataclasses.replace(run, data=dataclasses.replace(run.data, text_tokens=32, window=32))


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    if isinstance(run.objective, Answer):
        return questions.assemble(run, SigLIP(questions.with_answers(run)), words)
    model = SigLIP(run.model)
    return ImageTextSigmoid(model), pairs.collate(run, words, model)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    if isinstance(run.objective, Answer):
        return questions.build(run, out, assemble)
    return pairs.build(run, out, assemble)
