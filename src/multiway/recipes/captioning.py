"""What recipes of captioning share: the settings of the objective, and what they become. No recipe is named here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiway import evaluation
from multiway.data.captions import CaptionCollate
from multiway.data.collate import Words
from multiway.errors import ConfigError
from multiway.pretrained import Pretrained
from multiway.recipes import pairs
from multiway.run import Optim, Run, Schedule
from multiway.tasks.captioning import BEAMS, LENGTH_PENALTY, LONGEST, Captioning

COCO = 113_287
"""Pictures of Karpathy's training split of COCO, with five captions each."""
BATCH, EPOCHS = 256, 10


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Writing captions. ``ratio``: share of a caption's tokens that are hidden; ``smoothing``: share of the probability
    spread over the other words; ``drop``: share of the token losses, the worst, that do not count after ``drop_after``
    steps; ``beams``, ``length_penalty``: of the search when captions are written (masked.md 6.3, 6.5)."""

    ratio: float = 0.7
    smoothing: float = 0.1
    drop: float = 0.2
    drop_after: int = 12_000
    beams: int = BEAMS
    length_penalty: float = LENGTH_PENALTY

    def __post_init__(self) -> None:
        if not (0 < self.ratio <= 1 and 0 <= self.smoothing < 1 and 0 <= self.drop < 1 and self.beams > 0):
            raise ConfigError(
                f"objective: expected ratio above 0 and at most 1, smoothing and drop from 0 to below 1, one beam or "
                f"more; got {self}"
            )


def assemble(run: Run, model: Any, words: Words, branches: int) -> tuple[Captioning, CaptionCollate]:
    """Objective and collate of a run that tunes a model to write captions."""
    settings: Caption = run.objective
    collate = CaptionCollate(words=words, grid=run.model.grid, ratio=settings.ratio, branches=branches)
    return Captioning(model, settings.smoothing, settings.drop, settings.drop_after), collate


def figures(ready: Pretrained, run: Run, out: Path) -> dict[str, Any]:
    """How well captions are written: of embedded scenes, or of the data's split ``val``; nothing without one."""
    search = {"beams": run.objective.beams, "length_penalty": run.objective.length_penalty}
    if run.data.root is None:
        return {"captioning": evaluation.captioning_of_scenes(ready, run.seed, **search)}
    held_out = pairs.held_out(run, out)
    if held_out is None:
        return {}
    return {"captioning": evaluation.captioning_of(ready, held_out, evaluation.HELD_OUT, **search)}


def tuned(run: Run, name: str, lr: float) -> Run:
    """A run that tunes ``run``'s model on COCO's captions as released (masked.md 6.5): 480 px, 10 epochs, 1 of warm-up.

    An epoch is every caption once, in expectation: a step draws one of the captions of each of its pictures.
    """
    epoch = round(5 * COCO / BATCH)
    px = 480 // run.model.patch * run.model.patch
    return dataclasses.replace(
        run, recipe=name, objective=Caption(),
        model=dataclasses.replace(run.model, codes=0, contrast=False, drop_path=0.1, image_px=px),
        data=dataclasses.replace(run.data, images=0, texts=0, pairs=BATCH, text_tokens=LONGEST, jitter=0.0),
        optim=Optim(lr=lr, betas=(0.9, 0.999), eps=1e-8, clip=0.0),
        schedule=Schedule(steps=EPOCHS * epoch, warmup=epoch, final_lr=1e-6),
        parallel=dataclasses.replace(run.parallel, micro=1),
    )  # fmt: skip
