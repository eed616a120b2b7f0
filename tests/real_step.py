"""Steps of a run for real, in a process of its own: what `multiway plan` foretells, measured.

    python -m tests.real_step RECIPE [--SETTING VALUE ...]      prints the peak in bytes, as JSON

Everything that `multiway.rehearsal` makes fake is made here with content: weights, batch, optimisers, average. Under
torchrun the first of the processes tells of itself.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from multiway import config, recipes
from multiway.engine.optim import Average, build_optimizers, total_norm, update
from multiway.engine.parallel import Process, spread, start, synchronise_gradients
from multiway.estimate import KINDS
from multiway.rehearsal import made_up_words, make_samples
from multiway.run import Run

ALONE = Process(0, 1, torch.device("cpu"), None)


def real_step(run: Run, process: Process = ALONE) -> Callable[[], None]:
    """A function that takes one optimiser step, as the loop takes it, always on the same batch."""
    _, module = recipes.recipe(run.recipe)
    torch.manual_seed(0)
    objective, collate = module.assemble(run, made_up_words(run))
    objective.init_weights()
    objective.train()
    spread(objective, process, run.parallel)
    batch = collate(make_samples(run, items_of(run, process.world), {}))
    shape = len(batch["image"]), 3, run.model.image_px, run.model.image_px
    batch["image"] = torch.randint(0, 256, shape, dtype=torch.uint8)
    optimizers = build_optimizers(objective, run.optim, run.parallel.precision)
    average = Average(objective, run.optim.ema)
    across = process.across()

    def step() -> None:
        for i in range(run.parallel.micro):
            synchronise_gradients(objective, i == run.parallel.micro - 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=run.parallel.precision == "bf16"):
                output = objective(batch, objective.counts(batch), across)
            output.loss.backward()
        update(optimizers, run.optim.lr, float(total_norm(objective)), run.optim.clip)
        average.update(objective)
        objective.zero_grad(set_to_none=True)

    return step


def items_of(run: Run, world: int) -> dict[str, int]:
    """How many samples of each kind a micro-batch of one process has."""
    counts = {kind: getattr(run.data, name) for kind, name in KINDS.items()}
    return {kind: math.ceil(n / world / run.parallel.micro) for kind, n in counts.items() if n}


def peak_bytes(run: Run, process: Process) -> int:
    """Most memory that this process has had in steps of the run, above what it has with all libraries at work."""
    few = ["--data.images=1", "--data.texts=1", "--data.pairs=2", "--model.dim=64", "--model.hidden=64"]
    small = real_step(config.override(run, few), process)
    small()
    del small
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    rest = status("VmRSS")
    step = real_step(run, process)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step()
    return status("VmHWM") - rest


def status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    process = start(threads=1)
    peak = peak_bytes(config.override(recipes.recipe(sys.argv[1])[0], sys.argv[2:]), process)
    if process.rank == 0:
        print(json.dumps(peak))
    process.wait()
    process.stop()
