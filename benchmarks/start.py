"""What it costs to begin, and to have our loop around a step.

    python benchmarks/start.py

``import``: seconds that ``import multiway`` takes in a fresh interpreter, which must not import torch. ``loop``: how
many per cent longer a step takes in `multiway.engine.train` than the same forward, backward, clipping and fused AdamW
in a plain loop, on the same batch and model, in turns: the engine's steps are timed from batch to batch, and a bare
step is taken each time it asks for the next one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import SIZES, draw_lengths
from timing import figure, options, parsed, report, seconds

from multiway.data.collate import MaskedCollate, Sample, Words
from multiway.data.loader import Batches, Stream
from multiway.engine.train import Job, train
from multiway.recipes import beit3
from multiway.run import Checkpoint, Data, Parallel, Run, Schedule
from multiway.systems.beit3 import BEiT3, MaskedDataModeling
from multiway.types import Batch, move

IMPORT = """
import sys, time
begun = time.{clock}()
import multiway
print(time.{clock}() - begun)
sys.exit("torch" in sys.modules)
"""


class EnoughTurns(Exception):
    """Ends the engine's loop: all rounds are measured."""


class OneRecord:
    """A source of records that are never read: the batch is there already."""

    blocks = None

    def __len__(self) -> int:
        return 1

    def key(self, record: int) -> str:
        """Name for messages."""
        return "preloaded"


class Turns:
    """Hands the engine the same batch for every step, and takes a bare step before it does.

    ``loop``, ``bare``: seconds of the engine's steps and of the bare ones, round by round; the first is not counted.
    """

    def __init__(self, objective: MaskedDataModeling, batch: Batch, run: Run, args: argparse.Namespace) -> None:
        self.objective, self.batch, self.run, self.args = objective, batch, run, args
        self.optimizer = torch.optim.AdamW(objective.parameters(), lr=run.optim.lr, fused=True)
        self.now = time.process_time if args.clock == "cpu" else time.perf_counter
        self.given: float | None = None
        self.loop: list[float] = []
        self.bare: list[float] = []

    def __call__(self, samples: object) -> Batch:
        """The engine's collate."""
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        self.loop += [] if self.given is None else [self.now() - self.given]
        if len(self.loop) > self.args.repeats:
            raise EnoughTurns
        self.bare.append(seconds(self.step, self.args.device, self.args.clock))
        self.given = self.now()
        return self.batch

    def step(self) -> None:
        """What a training step cannot do without."""
        objective = self.objective
        batch = move(self.batch, torch.device(self.args.device))
        objective(batch, self.counts).loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), self.run.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def counts(self) -> dict[str, float]:
        """Items of the batch's terms."""
        return {term: float(n) for term, n in self.objective.counts(self.batch).items()}


def draw_batch(run: Run) -> Batch:
    """Random pairs of pictures and captions with stored visual tokens."""
    generator, shape = torch.Generator().manual_seed(1), run.model
    count, patches = run.data.pairs, shape.grid[0] * shape.grid[1]
    words = Words(bos=0, eos=2, mask_id=shape.vocab - 1, first=4, stop=shape.vocab - 1, longest=64, window=64)
    samples = [
        Sample(
            image=torch.randint(0, 256, (3, shape.image_px, shape.image_px), generator=generator, dtype=torch.uint8),
            text=torch.randint(words.first, words.stop, (n - 2,), generator=generator).numpy(),
            code=torch.randint(shape.codes, (patches,), generator=generator),
            rng=np.random.default_rng(i),
        )
        for i, n in enumerate(draw_lengths("caption", count, generator).tolist())
    ]
    return MaskedCollate(words=words, grid=shape.grid)({"pair": samples})


def measure_loop(args: argparse.Namespace) -> Turns:
    """Run the engine for as many steps as there are rounds."""
    run = dataclasses.replace(
        beit3.small(),
        model=SIZES[args.size],
        data=Data(pairs=args.batch),
        schedule=Schedule(steps=args.repeats + 2),
        parallel=Parallel(precision="fp32", threads=args.threads),
        checkpoint=Checkpoint(every=args.repeats + 3),
    )
    objective = MaskedDataModeling(BEiT3(run.model), None)
    objective.init_weights()
    objective.to(args.device)
    turns = Turns(objective, draw_batch(run), run, args)
    stream = Stream(kind="pair", sources=[OneRecord()], items=run.data.pairs, seed=0)

    def build(run: Run) -> Job:
        batches = Batches([stream], lambda *place: None, turns)
        return Job(objective=objective, batches=batches, data_hash="", export=no_export)

    with tempfile.TemporaryDirectory() as out, suppress(EnoughTurns):
        train(run, build, Path(out))
    return turns


def no_export(*given: Any) -> None:
    """Never called: the loop is left before it ends."""


def import_seconds(args: argparse.Namespace) -> float:
    """Seconds of one import in a process of its own."""
    clock = "process_time" if args.clock == "cpu" else "perf_counter"
    code = IMPORT.format(clock=clock)
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Both figures."""
    parser = options(__doc__)
    parser.set_defaults(repeats=20)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=4)
    args = parsed(parser)
    imports = [import_seconds(args) for _ in range(args.repeats + 1)][1:]
    turns = measure_loop(args)
    overhead = [100 * (own / bare - 1) for own, bare in zip(turns.loop[1:], turns.bare[1:], strict=True)]
    figures = {"import": figure(imports), "loop": figure(overhead)}
    report(args, figures, step_seconds=statistics.median(turns.bare[1:]))


if __name__ == "__main__":
    main()
