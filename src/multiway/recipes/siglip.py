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
from multiway.recipes import pairs
from multiway.recipes.pairs import Contrast
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.systems.siglip import PRESETS, SigLIP
from multiway.tasks.retrieval import ImageTextSigmoid
from multiway.types import Batch, Objective


def quick() -> Run:
    """Sigmoid contrast on the embedded scenes: two CPU cores, minutes.

    Command: ``multiway train siglip.quick --out runs/siglip``, or with ``--data.root DIR``, any folder of pictures with
    captions. Sizes and rates are ours. Not yet run by us.
    """
    return Run(
        recipe="siglip.quick",
        model=PRESETS["siglip_tiny_patch8_64"],
        objective=Contrast(),
        data=Data(pairs=96, vocab=512, text_tokens=64, window=64, pair_scale=1.0, flip=False, jitter=0.0),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=1000, warmup=100, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=500),
    )


def assemble(run: Run, words: Words) -> tuple[Objective, Callable[[Samples], Batch]]:
    """The objective of a run, not initialised, and what makes its batches."""
    model = SigLIP(run.model)
    return ImageTextSigmoid(model), pairs.collate(run, words, model)


def build(run: Run, out: Path) -> Job:
    """Everything the loop needs."""
    return pairs.build(run, out, assemble)
