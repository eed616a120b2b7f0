"""What masked image modelling does for a small encoder on few labelled pictures, and whether AvgDist foretells it.

The same encoder is tuned to classes from random weights, after MAE, after SimMIM with cells of several sizes, after
BEiT with visual tokens of k-means and of VQ-KD, and after distillation of the best of these. Pre-training sees all
pictures but those held out, without their classes; fine-tuning sees few of them with theirs. ``DATA`` is a folder with
pictures in folders named after their class, CIFAR-10's for instance. Runs continue where they were left; the last line
is one JSON object, and ``mim.png`` is drawn.

    python benchmarks/study_mim.py DATA [--out runs/study_mim] [--epochs 6] [--tune-epochs 12] [--seeds 3] [--jobs 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multiway.data.index import build
from multiway.data.order import generator
from multiway.engine.train import train
from multiway.metrics.avgdist import average_distance
from multiway.recipes import recipe
from multiway.recipes.pictures import LIGHT, Codes, Distil, Hiding
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule
from multiway.systems import beit as beit_system
from multiway.systems import feature_distillation as fd_system
from multiway.systems import mae as mae_system
from multiway.systems import simmim as simmim_system
from multiway.systems import vit as vit_system
from multiway.systems import vq_kd as vq_kd_system

PX, PATCH, DIM, DEPTH, HEADS = 32, 4, 96, 4, 3
PLAIN: dict[str, Any] = {"dim": DIM, "depth": DEPTH, "heads": HEADS, "hidden": 4 * DIM, "patch": PATCH, "image_px": PX}
STAGED: dict[str, Any] = {
    "dim": DIM, "depths": (DEPTH,), "heads": HEADS, "patch": PATCH, "image_px": PX, "layer_scale": 0.0
}  # fmt: skip
COLOURS: dict[str, Any] = {"mean": mae_system.Config().mean, "std": mae_system.Config().std, "share": 1.0}
CODES = 256
CELLS = (4, 8, 16)
"""Sides of SimMIM's cells, in pixels of pictures of 32."""
RATIO = 0.6
BATCH, TUNE_BATCH = 128, 64
PER_CLASS, HELD_OUT = 400, 200
"""Labelled and held-out pictures of every class."""


def split(data: Path, out: Path) -> None:
    """Copy the pictures once, and index three parts: everything but the held-out, the labelled, the held-out."""
    if (out / "index" / "everything").is_dir():
        return
    tables: dict[str, list[dict[str, str]]] = {"everything": [], "train": [], "val": []}
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        order = generator(0, "split", folder.name).permutation(len(files))
        (out / "images" / folder.name).mkdir(parents=True, exist_ok=True)
        for place, number in enumerate(order):
            name = f"images/{folder.name}/{files[number].name}"
            shutil.copyfile(files[number], out / name)
            if place < HELD_OUT:
                tables["val"].append({"image": name, "label": folder.name})
                continue
            tables["everything"].append({"image": name})
            if place < HELD_OUT + PER_CLASS:
                tables["train"].append({"image": name, "label": folder.name})
    for name, rows in sorted(tables.items(), reverse=True):  # what says that all is there comes last
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        build(out / f"{name}.jsonl", out / "index" / name)


def run_of(name: str, given: argparse.Namespace, model: Any, objective: Any, steps: int, seed: int, **more: Any) -> Run:
    """A run of the study; everything a stage does not say is common to all."""
    tuning = objective is LIGHT
    data = given.out / "data" / "index"
    run = Run(
        recipe=name, model=model, objective=objective,
        data=Data(
            root=str(data if tuning else data / "everything"), images=TUNE_BATCH if tuning else BATCH,
            image_scale=0.5, jitter=0.0,
        ),
        optim=Optim(lr=5e-4 if tuning else 1e-3, matrices="muon", betas=(0.9, 0.95)),
        schedule=Schedule(steps=steps, warmup=steps // 10), parallel=Parallel(precision="fp32", threads=1),
        checkpoint=Checkpoint(every=500), log=Log(tensorboard=False), seed=seed,
    )  # fmt: skip
    return dataclasses.replace(run, **more)


def pretraining(given: argparse.Namespace) -> dict[str, Run]:
    """Every way to pre-train that needs no other, by name."""
    steps = round(given.epochs * given.pictures / BATCH)
    arms: dict[str, Run] = {}
    decoder = {"decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 3}
    arms["MAE"] = run_of("mae.quick", given, mae_system.Config(**PLAIN, **COLOURS, **decoder), Hiding(), steps, 0)
    for cell in CELLS:
        model = simmim_system.Config(**STAGED, **COLOURS)
        hiding = Hiding(scheme="cells", ratio=RATIO, cell=cell)
        arms[f"SimMIM, cells of {cell} px"] = run_of("simmim.quick", given, model, hiding, steps, 0)
    arms["BEiT, k-means"] = run_of("beit.quick", given, tokens_model(), tokens(None), steps, 0)
    return arms


def tokens_model() -> beit_system.Config:
    """The encoder with a masked head."""
    return beit_system.Config(**PLAIN, **COLOURS, bias="shared", codes=CODES, layer_scale=0.0)


def tokens(tokenizer: Path | None) -> Codes:
    """Blocks of patches hidden, their visual tokens stored for four views of every picture."""
    return Codes(scheme="blocks", ratio=0.4, views=4, tokenizer=None if tokenizer is None else str(tokenizer / "final"))


def tuned(arm: str) -> tuple[str, Any]:
    """Recipe and model that an arm's weights are tuned in."""
    if arm in ("nothing (ViT)", "MAE"):
        pool = {"pool": "mean", "head_std": 2e-5} if arm == "MAE" else {"pool": "mean"}
        return "vit.quick", vit_system.Config(**PLAIN, **COLOURS, **pool)
    return "beit.quick_tune", beit_system.Config(**PLAIN, **COLOURS, bias="layer", layer_scale=0.0)


def folder_of(given: argparse.Namespace, arm: str) -> Path:
    """Where an arm is pre-trained."""
    return given.out / "pretrained" / arm.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")


def trained(run: Run, out: Path) -> dict[str, Any]:
    """Train a run, unless that was done; its last evaluation and the CPU seconds it took."""
    torch.set_num_threads(1)
    _, module = recipe(run.recipe)
    done = out / "study.json"
    if not done.is_file():
        began = time.process_time()
        train(run, partial(module.build, out=out), out)
        seconds = time.process_time() - began
        figures = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
        done.write_text(json.dumps({"seconds": seconds, **(figures[-1] if figures else {})}))
    return json.loads(done.read_text())


def tuning(given: argparse.Namespace, arm: str, seed: int) -> tuple[Run, Path]:
    """The run that tunes an arm's weights, and its folder."""
    name, model = tuned(arm)
    steps = round(given.tune_epochs * given.labelled / TUNE_BATCH)
    init = None if arm.startswith("nothing") else str(folder_of(given, arm) / "final")
    run = run_of(name, given, model, LIGHT, steps, seed, init=init)
    return run, given.out / "tuned" / f"{folder_of(given, arm).name}-{seed}"


def avgdist(cell: int) -> float:
    """Mean AvgDist of SimMIM's masks over 500 draws, in pixels at PX."""
    hide = Hiding(scheme="cells", ratio=RATIO, cell=cell).of((PX // PATCH, PX // PATCH), PATCH)
    drawn = [hide(generator(0, "avgdist", i)).reshape(PX // PATCH, -1) for i in range(500)]
    return float(np.mean([average_distance(np.kron(one, np.ones((PATCH, PATCH), bool))) for one in drawn]))


def everything(given: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """All stages: figures by arm."""
    arms = pretraining(given)
    first = {arm: pool.submit(trained, run, folder_of(given, arm)) for arm, run in arms.items()}
    seconds = {}
    seconds["MAE"] = first["MAE"].result()["seconds"]
    steps = round(given.epochs * given.pictures / BATCH)
    model = vq_kd_system.Config(**PLAIN, codes=CODES, code_dim=16, decoder_depth=1, teacher_dim=DIM, share=1.0)
    teacher = Distil(teacher=str(folder_of(given, "MAE") / "final"))
    book = folder_of(given, "VQ-KD")
    later = pool.submit(trained, run_of("vq_kd.quick", given, model, teacher, steps, 0), book)
    scratch = ["nothing (ViT)", "nothing (BEiT)"]
    found = {arm: [pool.submit(trained, *tuning(given, arm, seed)) for seed in range(given.seeds)] for arm in scratch}
    tokenizer_seconds = later.result()["seconds"]
    run = run_of("beit.quick", given, tokens_model(), tokens(book), steps, 0)
    first["BEiT, VQ-KD"] = pool.submit(trained, run, folder_of(given, "BEiT, VQ-KD"))
    for arm, work in first.items():
        seconds[arm] = work.result()["seconds"]
        found[arm] = [pool.submit(trained, *tuning(given, arm, seed)) for seed in range(given.seeds)]
    seconds["BEiT, VQ-KD"] += tokenizer_seconds
    accuracy = {arm: [top1(work.result()) for work in works] for arm, works in found.items()}
    best = max((arm for arm in accuracy if arm in first), key=lambda arm: statistics.mean(accuracy[arm]))
    student = fd_system.Config(**STAGED, **COLOURS, teacher_dim=DIM)
    arm = "distilled from the best"
    run = run_of(
        "feature_distillation.quick", given, student, Distil(teacher=str(folder_of(given, best) / "final")), steps, 0
    )
    seconds[arm] = pool.submit(trained, run, folder_of(given, arm)).result()["seconds"]
    works = [pool.submit(trained, *tuning(given, arm, seed)) for seed in range(given.seeds)]
    accuracy[arm] = [top1(work.result()) for work in works]
    tune_seconds = {arm: statistics.mean(w.result()["seconds"] for w in works) for arm, works in found.items()}
    return {
        "best": best,
        "arms": {
            arm: {
                "accuracy": [round(x, 4) for x in values],
                "mean": round(statistics.mean(values), 4),
                "spread": round(statistics.stdev(values), 4) if len(values) > 1 else None,
                "pretraining_seconds": round(seconds.get(arm, 0.0)),
                "tuning_seconds": round(tune_seconds.get(arm, 0.0)) or None,
                "avgdist": round(avgdist(int(arm.split()[-2])), 2) if arm.startswith("SimMIM") else None,
            }
            for arm, values in accuracy.items()
        },
    }


def top1(figures: dict[str, Any]) -> float:
    """Share of held-out pictures that were named."""
    return figures["image_classification"]["top1"]


def draw(arms: dict[str, Any], path: Path) -> None:
    """Accuracy by arm, a dot per seed; and of SimMIM against AvgDist."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    names: Sequence[str] = sorted(arms, key=lambda arm: arms[arm]["mean"])
    for row, arm in enumerate(names):
        values = [100 * x for x in arms[arm]["accuracy"]]
        left.barh(row, 100 * arms[arm]["mean"], color="#9db8d9", height=0.6)
        left.plot(values, [row] * len(values), "o", color="#1f3a5f", markersize=4)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("accuracy on held-out pictures, %")
    left.set_title("The same encoder after pre-training by ...", loc="left")
    hidden = [arm for arm in arms if arms[arm]["avgdist"]]
    for arm in hidden:
        right.plot([arms[arm]["avgdist"]] * len(arms[arm]["accuracy"]), [100 * x for x in arms[arm]["accuracy"]], "o",
                   color="#1f3a5f", markersize=4)  # fmt: skip
        right.annotate(
            arm.removeprefix("SimMIM, "), (arms[arm]["avgdist"], 100 * max(arms[arm]["accuracy"])), xytext=(0, 7),
            textcoords="offset points", ha="center",
        )  # fmt: skip
    right.margins(x=0.2, y=0.15)
    right.set_xlabel(f"AvgDist, pixels (pictures of {PX} px)")
    right.set_ylabel("accuracy, %")
    right.set_title("SimMIM: cells of other sizes", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """All arms, all seeds, the plot and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/study_mim"))
    parser.add_argument("--epochs", type=float, default=6.0, help="of pre-training")
    parser.add_argument("--tune-epochs", type=float, default=12.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    given = parser.parse_args()
    (given.out / "data").mkdir(parents=True, exist_ok=True)
    split(given.data, given.out / "data")
    tables = {name: (given.out / "data" / f"{name}.jsonl").read_text().count("\n") for name in ("everything", "train")}
    given.pictures, given.labelled = tables["everything"], tables["train"]
    began = time.time()
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        found = everything(given, pool)
    draw(found["arms"], given.out / "mim.png")
    print(
        json.dumps({"benchmark": "study_mim", "pictures": tables, "wall_seconds": round(time.time() - began), **found})
    )


if __name__ == "__main__":
    main()
