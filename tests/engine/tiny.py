"""A run of milliseconds a step that has all that must survive: experts, average, augmentation, masks, drop path.

Its records are in memory, fixed random pictures and texts, so a test needs no files. What a test wants to go wrong is
said by a :class:`Twist`, which can be sent to another process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multiway.data.collate import DualCollate, MaskedCollate, Words
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import Corpus, Load
from multiway.engine import optim
from multiway.engine.train import Job
from multiway.errors import RecordError
from multiway.nn import attention, linear
from multiway.nn.quantize import PatchCodebook
from multiway.objectives import masked
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule
from multiway.systems.beit3 import BEiT3, Config, MaskedAndContrast, MaskedDataModeling
from multiway.tasks.retrieval import ImageTextContrast

MODEL = Config(
    dim=32, depth=2, heads=2, hidden=64, patch=8, image_px=32, vocab=40, text_positions=14, codes=8, drop_path=0.2,
    init_std=0.1,
)  # fmt: skip
WORDS = Words(bos=0, eos=2, mask_id=39, first=4, stop=39, longest=12, window=10)
SIZES = {"image": 21, "pair": 13, "text": 17}
"""Records of each kind; a step takes 8 of each, so epochs end inside steps."""


@dataclass(frozen=True)
class Twist:
    """What differs from an ordinary run.

    ``at``: step (from 1) -> what happens in its forward, on all ranks or on ``rank`` alone: ``loss`` or ``gradient``
    becomes infinite, ``term`` sends us SIGTERM, ``pause`` sleeps until killed. ``bad``: records of pictures alone that
    cannot be read; ``slow``: seconds it takes to read any picture; ``note``: write to ``samples-RANK.jsonl`` which
    samples each micro-batch held; ``data_hash``; ``own_counts``: divide every micro-batch by its own counts, as if it
    were a whole step (the usual mistake); ``large``: take the fast paths that only large models take.
    """

    at: Mapping[int, str] = field(default_factory=dict)
    rank: int | None = None
    bad: frozenset[int] = frozenset()
    slow: float = 0.0
    note: bool = False
    data_hash: str = "data"
    own_counts: bool = False
    large: bool = False


PLAIN = Twist()


@dataclass(frozen=True)
class Kind:
    """The objective of a run: ``masked``, ``contrast`` or ``both``."""

    name: str = "masked"


def tiny(steps: int = 8, *, kind: str = "masked", items: int = 8, **changes: Any) -> Run:
    """A run that saves every second step and evaluates every third; ``changes`` replace whole parts."""
    alone = 0 if kind == "contrast" else items
    run = Run(
        recipe="tiny",
        model=dataclasses.replace(MODEL, masked=kind != "contrast", contrast=kind != "masked"),
        objective=Kind(kind),
        data=Data(images=alone, texts=alone, pairs=items),
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

    def __init__(self, kind: str, twist: Twist = PLAIN) -> None:
        rng = np.random.default_rng(len(kind))
        self.kind, self.slow = kind, twist.slow
        self.bad = twist.bad if kind == "image" else ()
        coarse = torch.from_numpy(rng.integers(0, 256, (SIZES[kind], 3, 4, 4), dtype=np.uint8))
        self.images = F.interpolate(coarse.float(), size=(40, 36), mode="bilinear").round().to(torch.uint8)
        self.ids = [rng.integers(WORDS.first, WORDS.stop, rng.integers(3, 11)) for _ in range(SIZES[kind])]

    def __len__(self) -> int:
        return SIZES[self.kind]

    def key(self, record: int) -> str:
        return f"{self.kind}s/{record:03d}.png"

    def label(self, record: int) -> None:
        return None

    def image(self, record: int, px: int | None = None, decoder: str = "pillow") -> Tensor:
        time.sleep(self.slow)
        if record in self.bad:
            raise RecordError(f"{self.key(record)}: truncated picture", reason="truncated")
        return self.images[record]

    def texts(self, record: int) -> list[np.ndarray]:
        return [self.ids[record], self.ids[record][::-1]]

    def window(self, record: int) -> np.ndarray:
        return self.ids[record]


class Spike(torch.autograd.Function):
    """Zero, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_full(ctx.shape, float("inf"))


class Watched:
    """In front of an objective: notes what it is given, and does what the twist says."""

    def watch(self, run: Run, out: Path, twist: Twist) -> None:
        """``out``: its newest checkpoint tells at which step we begin."""
        saved = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
        self.micro, self.out, self.twist = run.parallel.micro, out, twist
        self.micros = self.micro * int(saved[-1].removeprefix("step-")) if saved else 0  # done so far

    def forward(self, batch: Any, counts: Any, across: Any) -> Any:
        step, self.micros = self.micros // self.micro + 1, self.micros + 1
        if self.twist.note:
            with (self.out / f"samples-{across.rank}.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "sample": batch["sample"].tolist()}) + "\n")
        if self.twist.own_counts:
            parts = self.micro * across.world
            counts = {name: parts * own for name, own in self.counts(batch).items()}  # type: ignore[attr-defined]
        output = super().forward(batch, counts, across)  # type: ignore[misc]
        what = self.twist.at.get(step) if self.twist.rank in (None, across.rank) else None
        if what == "loss":
            return dataclasses.replace(output, loss=output.loss * float("nan"))
        if what == "gradient":
            spike = Spike.apply(self.model.vision.cls_token)  # type: ignore[attr-defined]
            return dataclasses.replace(output, loss=output.loss + spike)
        if what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "pause":
            time.sleep(600)
        return output


class Masked(Watched, MaskedDataModeling):
    """Masked data modelling, watched."""


class Contrast(Watched, ImageTextContrast):
    """Contrast, watched."""


class Both(Watched, MaskedAndContrast):
    """Both at once, watched; half of the pairs are read together."""


def take_fast_paths() -> None:
    """For the rest of this process: lean maps, linear maps as convolutions (with two threads), attention head by head,
    losses in parts, gradients cast in several parts."""
    linear.lean_pays = lambda x, to: True
    linear.MANY_ROWS = attention.ONEDNN_LENGTH = 1
    optim.PART = 2000
    masked.LOGITS_BYTES = 4 * 40 * 3  # three places, of 40 words


def build(run: Run, out: Path, twist: Twist = PLAIN) -> Job:
    """What a recipe's ``build`` does, for records in memory."""
    if twist.large:
        take_fast_paths()
    torch.manual_seed(run.seed)
    model = BEiT3(run.model)
    items = {"image": run.data.images, "pair": run.data.pairs, "text": run.data.texts}
    sources = {kind: [Records(kind, twist)] for kind in SIZES}
    streams = [Stream(kind=kind, sources=sources[kind], items=items[kind], seed=run.seed) for kind in SIZES]
    view = View(px=run.model.image_px, scale=(0.4, 1.0), flip=0.5, jitter=0.4)
    corpus = Corpus(sources=sources, weights=dict.fromkeys(SIZES), tokenizer=None, hash="")  # type: ignore[arg-type]
    load = Load(corpus=corpus, views={"image": view, "pair": view}, seed=run.seed)
    shape = {"words": WORDS, "grid": run.model.grid, "branches": 2 * run.model.depth if run.model.drop_path else 0}
    objective: Any
    if run.objective.name == "contrast":
        objective = Contrast(model)
        collate: Any = DualCollate(**shape)
    else:
        both = run.objective.name == "both"
        book = PatchCodebook(run.model.codes, run.model.patch)
        book.centroids.uniform_(generator=torch.Generator().manual_seed(0))
        objective = (Both if both else Masked)(model, book)
        collate = MaskedCollate(**shape, contrast=both, joint=0.5 if both else 1.0)
    objective.init_weights()
    objective.watch(run, out, twist)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")

    batches = Batches(streams, load, collate)
    return Job(objective=objective, batches=batches, data_hash=twist.data_hash, export=export, evaluate=evaluate)


@torch.inference_mode()
def evaluate(model: nn.Module) -> dict[str, Any]:
    """Numbers that depend on every block, as a task would compute them: outside autograd altogether."""
    records = Records("pair")
    pictures = torch.stack([record[:, :32, :32] for record in records.images])
    image = model.encode(image=pictures).prefix("image")
    text = model.encode(text=[torch.from_numpy(ids) for ids in records.ids]).prefix("text")
    return {"image": float(image.double().square().mean()), "text": float(text.double().square().mean())}


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without times."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of one process, as GROUP/NAME."""
    return {
        f"{file.name.split('-')[0]}/{name}": x
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, x in load_file(file).items()
    }


def left(out: Path) -> dict[str, Any]:
    """All that a finished run left, for comparison to the bit: SHA-256 of files, and rows."""
    newest = max((out / "checkpoints").glob("step-*"))
    files = [*newest.iterdir(), *(out / "final").iterdir(), out / "run.json"]
    hashes = {file.name: sha256(file.read_bytes()).hexdigest() for file in files if file.name != "MANIFEST.json"}
    return {"hashes": hashes, "metrics": rows(out / "metrics.jsonl"), "eval": rows(out / "eval.jsonl")}
