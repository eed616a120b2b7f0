"""What masked pre-training does for the contrastive stage at equal total compute, on the embedded scenes.

Three arms get the same CPU seconds of one thread: contrast alone; masked data modelling for a third, then contrast;
both in every step. The cost of a step of each kind is measured first, in one interleaved run; steps follow from it.
Figures are recall@1 among 1,000 held-out scenes by other writers. Last line: one JSON object.

    python benchmarks/study_pretraining.py [--out runs/study] [--budget 60] [--seeds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from multiway.engine.optim import build_optimizers
from multiway.engine.train import train
from multiway.recipes import beit3
from multiway.run import Run, Schedule

PROBE = 12
"""Steps measured of each kind; the first quarter is not counted."""


def contrast_run() -> Run:
    """The quick recipe without masking: pairs apart, nothing hidden."""
    run = beit3.quick()
    model = dataclasses.replace(run.model, masked=True, contrast=True)
    data = dataclasses.replace(run.data, images=0, texts=0, pairs=128)
    return dataclasses.replace(run, recipe="beit3.quick_itc", model=model, objective=beit3.Contrast(), data=data)


def masked_run() -> Run:
    """The quick recipe without contrast: as many pictures, texts and pairs."""
    run = beit3.quick()
    data = dataclasses.replace(run.data, images=48, texts=48, pairs=48)
    return dataclasses.replace(run, objective=beit3.Masked(views=1), data=data)


def seconds_per_step(runs: dict[str, Run], out: Path) -> dict[str, float]:
    """CPU seconds of one training step (batch, forward, backward, update) of every kind, measured interleaved."""
    jobs = {name: beit3.build(run, out / f"probe-{name}") for name, run in runs.items()}
    optimizers = {name: build_optimizers(job.objective, runs[name].optim) for name, job in jobs.items()}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(PROBE):
        for name, job in jobs.items():
            begun = time.process_time()
            batch, _ = job.batches.batch(step)
            job.objective(batch, job.objective.counts(batch)).loss.backward()
            for optimizer in optimizers[name]:
                optimizer.step()
            job.objective.zero_grad()
            costs[name].append(time.process_time() - begun)
    return {name: statistics.median(values[PROBE // 4 :]) for name, values in costs.items()}


def trained(run: Run, steps: int, seed: int, out: Path, init: Path | None = None) -> dict[str, Any]:
    """Train a run for so many steps and return its evaluation and its CPU seconds."""
    schedule = Schedule(steps=steps, warmup=min(100, steps // 5), final_lr=run.schedule.final_lr)
    parallel = dataclasses.replace(run.parallel, threads=1)
    run = dataclasses.replace(
        run, schedule=schedule, seed=seed, init=str(init / "final") if init else None, parallel=parallel
    )
    train(run, partial(beit3.build, out=out), out)
    lines = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    return lines[-1]


def main() -> None:
    """All arms, all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds of training per arm and seed")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = {"contrast": contrast_run(), "masked": masked_run(), "both": beit3.quick()}
    cost = seconds_per_step(runs, given.out)
    steps = {
        "contrast alone": {"contrast": round(given.budget / cost["contrast"])},
        "masked, then contrast": {
            "masked": round(given.budget / 3 / cost["masked"]),
            "contrast": round(given.budget * 2 / 3 / cost["contrast"]),
        },
        "both in every step": {"both": round(given.budget / cost["both"])},
    }
    recalls: dict[str, list[list[float]]] = {arm: [] for arm in steps}
    for seed in range(given.seeds):
        for arm, stages in steps.items():
            last: Path | None = None
            figures: dict[str, Any] = {}
            for stage, count in stages.items():
                out = given.out / f"{arm.replace(' ', '-').replace(',', '')}-{stage}-{seed}"
                figures = trained(runs[stage], count, seed, out, last)
                last = out
            found = figures["retrieval"]
            recalls[arm].append([found["image_to_text"]["r1"], found["text_to_image"]["r1"]])
            print(f"seed {seed}  {arm}: recall@1 {recalls[arm][-1]}", flush=True)
    result = {
        arm: {
            "steps": steps[arm],
            "image_to_text_r1": [round(r[0], 3) for r in found],
            "text_to_image_r1": [round(r[1], 3) for r in found],
            "mean": round(statistics.mean(sum(r) / 2 for r in found), 3),
        }
        for arm, found in recalls.items()
    }
    print(
        json.dumps(
            {"benchmark": "study_pretraining", "cpu_seconds": given.budget, "step_seconds": cost, "arms": result}
        )
    )


if __name__ == "__main__":
    main()
