"""Recipes of CLIP: contrast of pictures and texts, from scratch.

``multiway train clip.NAME --out DIR`` trains one; every setting can be overridden (``multiway show clip.NAME``), and
``--init DIR`` tunes the weights of a folder. Figures of the published sizes are the paper's (masked.md 8.2, from memory
there); crops are open_clip's. A batch larger than the memory is trained with ``--parallel.micro N`` at equal maths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from multiway.data.collate import Samples, Words
from multiway.engine.train import Job
from multiway.recipes import pairs
from multiway.recipes.pairs import Contrast
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
    captions. Sizes and rates are ours. Not yet run by us.
    """
    return Run(
        recipe="clip.quick",
        model=PRESETS["clip_vit_tiny_patch8_64"],
        objective=Contrast(),
        data=Data(pairs=96, vocab=512, text_tokens=64, window=64, pair_scale=1.0, flip=False, jitter=0.0),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=1000, warmup=100, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=500),
    )


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    model = CLIP(run.model)
    return ImageTextContrast(model, run.objective.negatives), pairs.collate(run, words, model)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pairs.build(run, out, assemble)
