"""A run that takes milliseconds a step and has everything that must survive: experts, average, augmentation, masks, drop path.

Its records are in memory: fixed random pictures and texts, so that a test needs no files. What a test wants to go wrong
is said by a :class:`Twist`, which can be sent to another process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multiway.data.collate import DualCollate, MaskedCollate, Words
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import Corpus, Load
from multiway.engine.train import Job
from multiway.errors import RecordError
from multiway.nn.quantize import PatchCodebook
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule
from multiway.systems.beit3 import BEiT3, Config, MaskedDataModeling
from multiway.tasks.retrieval import ImageTextContrast

MODEL = Config(
    dim=32, depth=2, heads=2, hidden=64, patch=8, image_px=32, vocab=40, text_positions=14, codes=8, drop_path=0.2,
    init_std=0.1,
)  # fmt: skip
WORDS = Words(bos=0, eos=2, mask_id=39, first=4, stop=39, longest=12, window=10)
SIZES = {"image": 21, "pair": 13, "text": 17}
"""Records of each kind; a step takes 8 of each, so that epochs end inside steps."""


@dataclass(frozen=True)
class Twist:
    """What differs from an ordinary run.

    ``poison``: step (from 1) -> what is made NaN or infinite in it, ``loss`` or ``gradient``, on ``poison_rank`` alone
    where that is given; ``bad``: records of pictures alone that cannot be read; ``note``: write which samples each step
    consumed to ``samples-RANK.jsonl``; ``hash``: of the data; ``exported``: what the model is evaluated under.
    """

    poison: Mapping[int, str] = field(default_factory=dict)
    poison_rank: int | None = None
    bad: frozenset[int] = frozenset()
    note: bool = False
    hash: str = "data"


@dataclass(frozen=True)
class Kind:
    """The objective of a run, by name: ``masked`` or ``contrast``."""

    name: str = "masked"


def tiny(steps: int = 8, *, kind: str = "masked", items: int = 8, **changes: Any) -> Run:
    """A run of ``steps`` steps that saves every second one; ``changes`` replace whole parts."""
    contrast = kind == "contrast"
    run = Run(
        recipe="tiny",
        model=dataclasses.replace(MODEL, masked=not contrast, contrast=contrast),
        objective=Kind(kind),
        data=Data(images=0 if contrast else items, texts=0 if contrast else items, pairs=items),
        optim=Optim(lr=3e-3, layer_decay=0.9, ema=0.9),
        schedule=Schedule(steps=steps, warmup=3, final_lr=1e-4),
        parallel=Parallel(precision="fp32", threads=1),
        checkpoint=Checkpoint(every=2),
        log=Log(evaluate=3),
        seed=5,
    )
    return dataclasses.replace(run, **changes)


class Records:
    """Fixed random records of one kind."""

    blocks = None

    def __init__(self, kind: str, bad: frozenset[int] = frozenset()) -> None:
        rng = np.random.default_rng(len(kind))
        self.kind, self.bad = kind, bad
        coarse = torch.from_numpy(rng.integers(0, 256, (SIZES[kind], 3, 4, 4), dtype=np.uint8))
        self.images = F.interpolate(coarse.float(), size=(40, 36), mode="bilinear").round().to(torch.uint8)
        self.ids = [rng.integers(WORDS.first, WORDS.stop, rng.integers(3, 11)) for _ in range(SIZES[kind])]

    def __len__(self) -> int:
        return SIZES[self.kind]

    def key(self, record: int) -> str:
        return f"{self.kind}s/{record:03d}.png"

    def image(self, record: int, px: int | None = None) -> Tensor:
        if record in self.bad:
            raise RecordError(f"{self.key(record)}: truncated picture", reason="truncated")
        return self.images[record]

    def texts(self, record: int) -> list[np.ndarray]:
        return [self.ids[record], self.ids[record][::-1]]

    def window(self, record: int) -> np.ndarray:
        return self.ids[record]


class Watched:
    """Lets a test poison an objective and see what it consumes; mixed into the objectives proper."""

    twist: Twist
    out: Path
    model: nn.Module
    done: int

    def counts(self, batch: Any) -> dict[str, int]:
        self.consumed = [*getattr(self, "consumed", []), batch["sample"].tolist()]
        return super().counts(batch)  # type: ignore[misc]

    def forward(self, batch: Any, counts: Any, across: Any) -> Any:
        output = super().forward(batch, counts, across)  # type: ignore[misc]
        self.steps_seen
        return output


def build(run: Run, out: Path, twist: Twist = Twist()) -> Job:
    """What a recipe's ``build`` does, for records in memory."""
