"""What pre-training does for the tasks a small encoder is used for, at equal compute.

One BEiT-3 is pre-trained on photographs with captions in two languages, emoji with their names in thirty, and plain
texts: by hiding, by contrast, by both, or not at all. Then it is tuned to eight tasks, every time with the same recipe,
steps and seed; whoever was not pre-trained shares that time out among the tasks as more steps of tuning. Steps follow
from CPU seconds per step, measured first. ``DATA`` is a folder with the sets flickr8k-224, nlvr1, text-small and
emoji-noto, packed or not. Runs continue where they were left; the last line is one JSON object, and ``transfer.png`` is
drawn.

    python benchmarks/study_transfer.py DATA [--out runs/study_transfer] [--seeds 1] [--jobs 2] [--smoke] [--record]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import multiprocessing
import shutil
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from multiway import answers, evaluation, pretrained
from multiway.data.index import Index, build
from multiway.data.questions import open_examples
from multiway.data.text import TextTokenizer
from multiway.engine.optim import build_optimizers
from multiway.engine.train import train
from multiway.metrics.recall import chance, recall
from multiway.recipes import beit3
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule

SETS = ("flickr8k-224", "nlvr1", "text-small", "emoji-noto")
VOCAB = 8192
SHAPE: dict[str, Any] = {
    "dim": 160, "depth": 4, "heads": 5, "hidden": 480, "image_px": 96, "vocab": VOCAB, "text_positions": 66,
    "drop_path": 0.05, "init_std": 0.1,
}  # fmt: skip
ARMS: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "masked": (beit3.Masked(), {"codes": 512}, {"images": 32, "texts": 32, "pairs": 128}),
    "contrast": (beit3.Contrast(), {"masked": False, "codes": 0, "contrast": True}, {"pairs": 256}),
    "both": (
        beit3.Masked(contrast=True, joint=0.25), {"codes": 512, "contrast": True},
        {"images": 32, "texts": 32, "pairs": 128},
    ),
}  # fmt: skip
"""Ways to pre-train: objective, heads, what a step is made of."""
NEITHER = "neither"
PROBE = 8
"""Steps measured of every kind; the first quarter is not counted."""
HELD_OUT = 5
"""One concept of so many is held out."""


class Task(NamedTuple):
    """A task: title and steps of tuning; recipe; where among the figures the one that is drawn and its floor lie, and
    its factor; figures others published."""

    title: str
    steps: int
    recipe: Callable[[], Run]
    score: tuple[str, ...]
    floor: tuple[str, ...]
    times: int = 100
    published: tuple[tuple[str, float, float], ...] = ()


FOUND, GUESSED = ("text_to_image", "r10"), ("chance", "text_to_image", "r10")
TASKS: dict[str, Task] = {
    "retrieval_en": Task("Flickr8k, English: recall@10, %", 250, beit3.quick_retrieval, FOUND, GUESSED),
    "retrieval_zh": Task("Flickr8k, Chinese: recall@10, %", 250, beit3.quick_retrieval, FOUND, GUESSED),
    "retrieval_emoji": Task("emoji, 30 languages: recall@10, %", 250, beit3.quick_retrieval, FOUND, GUESSED),
    "captioning_en": Task(
        "English captions: CIDEr-D x 100", 250, beit3.quick_captioning, ("cider_d",), ("floor", "cider_d")
    ),
    "captioning_zh": Task(
        "Chinese captions: CIDEr-D x 100", 250, beit3.quick_captioning, ("cider_d",), ("floor", "cider_d")
    ),
    "nlvr1": Task(
        "NLVR1: accuracy, %", 400, beit3.quick_nlvr2, ("accuracy",), ("floor", "accuracy"),
        published=(("text only", 56.6, 56.6), ("modules", 63.1, 63.1), ("CNN-BiATT", 66.9, 66.9)),
    ),
    "sst2": Task(
        "SST-2: accuracy, %", 250, beit3.quick_text, ("accuracy",), ("floor", "accuracy"),
        published=(("words", 80, 80), ("CNN", 87, 87), ("BERT-base", 93.5, 93.5)),
    ),
    "cola": Task(
        "CoLA: Matthews x 100", 250, beit3.quick_text, ("matthews",), ("floor", "matthews"),
        published=(("LSTM", 20, 35), ("BERT-base", 52, 60)),
    ),
}  # fmt: skip
"""Published figures: those of the data's descriptions, recalled there; all trained on more, NLVR1 on twelve times."""


# ------------------------------------------------------------------------------------------------------------ the data


def unpack(data: Path, raw: Path) -> None:
    """Copy the sets, or what their archives hold, to one folder."""
    for name in SETS:
        if (raw / name).is_dir():
            continue
        archives = sorted((data / name).glob("*.tar.xz"))
        aside = raw / f".tmp-{name}"
        for archive in archives:
            with tarfile.open(archive) as file:
                file.extractall(aside, filter="data")
        if not archives:
            shutil.copytree(data / name, aside / name)
        (aside / name).rename(raw / name)


def rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_held_out(codepoints: str) -> bool:
    """Whether an emoji is kept for the evaluation, by its name alone."""
    return hashlib.sha256(codepoints.encode()).digest()[0] % HELD_OUT == 0


def texts(folder: Path) -> Iterator[str]:
    """Texts without labels: Wikipedia, captions in four languages line by line, sentences of the tasks to come."""
    yield from filter(str.strip, (folder / "wikitext2_valid.txt").read_text().splitlines())
    languages = [(folder / "multi30k" / f"train.{name}").read_text().splitlines() for name in ("en", "de", "fr", "cs")]
    yield from (text for same in zip(*languages, strict=True) for text in same)
    yield from (line.split("\t")[0] for line in (folder / "sst2" / "train.tsv").read_text().splitlines())
    yield from (line.split("\t")[3] for line in (folder / "cola" / "in_domain_train.tsv").read_text().splitlines())


def tables(raw: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Records of the pre-training and of the tasks with pictures and texts, by name and split."""
    photos = {part: rows(raw / "flickr8k-224" / f"{part}.jsonl") for part in ("train", "val")}
    for found in photos.values():
        for row in found:
            row["image"] = f"flickr8k-224/{row['image']}"
    emoji: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for row in rows(raw / "emoji-noto" / "train.jsonl"):
        own = {"image": f"emoji-noto/{row['image']}", "captions": list(row["names"].values())}
        emoji["val" if is_held_out(row["codepoints"]) else "train"].append(own)

    def pairs(*fields: str) -> dict[str, list[dict[str, Any]]]:
        return {
            part: [{"image": row["image"], "captions": [text for name in fields for text in row[name]]} for row in own]
            for part, own in photos.items()
        }

    everything = pairs("captions", "captions_zh")["train"] + emoji["train"]
    english, chinese = pairs("captions"), pairs("captions_zh")
    return {
        "pretraining": {"train": everything + [{"text": text} for text in texts(raw / "text-small")]},
        "retrieval_en": english, "captioning_en": english, "retrieval_zh": chinese, "captioning_zh": chinese,
        "retrieval_emoji": emoji,
    }  # fmt: skip


def prepare(data: Path, out: Path) -> None:
    """Unpack, train the one tokenizer on all texts, and index everything; nothing that is there is made again."""
    raw = out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    unpack(data, raw)
    given = tables(raw)
    if not (out / "tokenizer.json").is_file():
        told = [text for row in given["pretraining"]["train"] for text in row.get("captions", [row.get("text")])]
        TextTokenizer.train(told, VOCAB).save(out / "tokenizer.json")
    tokenizer = TextTokenizer.load(out / "tokenizer.json")

    def index(name: str, part: str, table: Path, task: str | None = None) -> None:
        if not (out / "index" / name / part / "manifest.json").is_file():
            more = {"task": task} if task else {}
            build(table, out / "index" / name / part, tokenizer=tokenizer, window=64, progress=False, **more)

    for name, parts in given.items():
        for part, own in parts.items():
            table = raw / f"{name}-{part}.jsonl"
            table.write_text("".join(json.dumps(row) + "\n" for row in own))
            index(name, part, table)
    small = raw / "text-small"
    for part, own in (("train", "train"), ("val", "dev")):
        index("nlvr1", part, raw / "nlvr1" / f"{own}.jsonl", "nlvr2")
        index("sst2", part, small / "sst2" / f"{own}.tsv", "text_classification")
        index("cola", part, small / "cola" / f"in_domain_{own}.tsv", "text_classification")


# ------------------------------------------------------------------------------------------------------------ the runs


def pretraining(given: argparse.Namespace, arm: str, seed: int, cost: float | None = None) -> tuple[Run, Path]:
    """The run of an arm, as many steps as it may, and its folder; ``cost``: CPU seconds of a step."""
    objective, heads, items = ARMS[arm]
    run = beit3.photos()
    steps = max(2, round(given.budget / cost)) if cost else PROBE
    run = dataclasses.replace(
        run,
        recipe="beit3.photos",
        model=dataclasses.replace(run.model, **SHAPE, **{"contrast": False, **heads}),
        objective=objective,
        data=Data(
            images=items.get("images", 0), texts=items.get("texts", 0), pairs=items["pairs"], image_scale=0.4,
            pair_scale=0.5, flip=False, jitter=0.2, text_tokens=40, window=64,
        ),
        optim=Optim(lr=2e-3, matrices="muon", weight_decay=0.1),
        schedule=Schedule(steps=steps, warmup=steps // 10),
    )  # fmt: skip
    return common(given, run, "pretraining", seed), given.out / "pretrained" / f"{arm}-{seed}"


def tuning(
    given: argparse.Namespace, arm: str, name: str, seed: int, cost: float | None = None
) -> tuple[Run, Path]:  # fmt: skip
    """The run that tunes an arm to a task, and its folder; ``cost``: CPU seconds of a step."""
    run = TASKS[name].recipe()
    more = given.budget / len(TASKS) / cost if cost and arm == NEITHER else 0
    steps = round((4 if given.smoke else TASKS[name].steps) + more)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **SHAPE),
        optim=dataclasses.replace(run.optim, layer_decay=1.0),
        schedule=dataclasses.replace(run.schedule, steps=steps, warmup=steps // 10),
        init=str(given.out / "pretrained" / f"{arm}-{seed}" / "final") if arm != NEITHER else None,
    )
    return common(given, run, name, seed), given.out / "tuned" / f"{arm}-{name}-{seed}"


def common(given: argparse.Namespace, run: Run, name: str, seed: int) -> Run:
    """What all runs have alike."""
    root, tokenizer = given.out / "index" / name / "train", given.out / "tokenizer.json"
    return dataclasses.replace(
        run, seed=seed,
        data=dataclasses.replace(run.data, root=str(root), tokenizer=str(tokenizer), vocab=VOCAB),
        parallel=Parallel(precision="fp32", threads=1), checkpoint=Checkpoint(every=100, keep=1),
        log=Log(tensorboard=False),
    )  # fmt: skip


def seconds_per_step(given: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of one training step of every arm and every task, measured in turns, once."""
    path = given.out / "costs.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    runs = {arm: pretraining(given, arm, 0)[0] for arm in ARMS} | {
        name: tuning(given, NEITHER, name, 0)[0] for name in TASKS
    }
    jobs = {name: beit3.build(run, given.out / "probe" / name) for name, run in runs.items()}
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
    found = {name: statistics.median(values[PROBE // 4 :]) for name, values in costs.items()}
    path.write_text(json.dumps(found))
    return found


def trained(run: Run, out: Path, measure: Callable[[Path], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Train and measure, unless that was done: figures, and the CPU seconds of the training that ended it."""
    torch.set_num_threads(1)
    done = out / "study.json"
    if not done.is_file():
        began = time.process_time()
        train(run, partial(beit3.build, out=out), out)
        found: dict[str, Any] = {"steps": run.schedule.steps, "seconds": round(time.process_time() - began, 1)}
        if measure is not None:
            found["figures"] = measure(out / "final")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        done.write_text(json.dumps(found))
    return json.loads(done.read_text())


def measured(name: str, index: Path, smoke: bool, folder: Path) -> dict[str, Any]:
    """Figures of a tuned model on a task's held-out records."""
    model = pretrained.load(folder)
    most = 20 if smoke else None
    if name == "retrieval_emoji":
        return by_language(model, index)
    if name.startswith("retrieval"):
        return evaluation.retrieval_of(model, Index.open(index).sources, most)
    if name.startswith("captioning"):
        unit = "characters" if name.endswith("zh") else "words"
        return evaluation.captioning_of(model, Index.open(index).sources, most, unit=unit)
    task = "nlvr2" if name == "nlvr1" else "text_classification"
    corpus = open_examples(Data(root=str(index)), task, index)
    return answers.measure(model, corpus, task, "" if name == "nlvr1" else name)[0]


def by_language(model: pretrained.Pretrained, index: Path) -> dict[str, Any]:
    """Recall of emoji by their names, among all held-out emoji, as the mean over languages and of each."""
    source = Index.open(index).sources[0]
    raw = rows(index.parents[2] / "raw" / "emoji-noto" / "train.jsonl")
    languages = list(raw[0]["names"])
    numbers = np.arange(len(source))
    image = model.encode_image(source.image(i, model.source_px) for i in numbers).numpy()
    names = [source.strings(i) for i in numbers]
    text = model.encode_text([own[j] for j in range(len(languages)) for own in names]).numpy()
    text = text.reshape(len(languages), len(numbers), -1)
    found = {name: recall(own, image, numbers, numbers) for name, own in zip(languages, text, strict=True)}
    mean = {k: statistics.mean(own[k] for own in found.values()) for k in ("r1", "r5", "r10")}
    floor = {"text_to_image": chance(numbers, numbers)}
    return {"candidates": len(numbers), "text_to_image": mean, "chance": floor, "languages": found}


# ----------------------------------------------------------------------------------------------------------- the study


def everything(given: argparse.Namespace, costs: dict[str, float], pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Pre-train, tune and measure all arms; what was found, by names of arm and task (or ``pretraining``) and seed."""
    work: dict[Future[Any], tuple[str, str, int]] = {}
    left: dict[tuple[str, str, int], float] = {}
    found: dict[str, Any] = {}

    def tune(arm: str, seed: int) -> None:
        for name in TASKS:
            run, folder = tuning(given, arm, name, seed, costs[name])
            measure = partial(measured, name, given.out / "index" / name / "val", given.smoke)
            work[pool.submit(trained, run, folder, measure)] = arm, name, seed

    for seed in range(given.seeds):
        for arm in ARMS:
            work[pool.submit(trained, *pretraining(given, arm, seed, costs[arm]))] = arm, "pretraining", seed
            left[arm, "pretraining", seed] = given.budget
        tune(NEITHER, seed)
        for arm in (NEITHER, *ARMS):
            for name in TASKS:
                left[arm, name, seed] = costs[name] * tuning(given, arm, name, seed, costs[name])[0].schedule.steps
    total, began = sum(left.values()), time.monotonic()
    while work:
        for done in wait(work, return_when=FIRST_COMPLETED).done:
            arm, name, seed = work.pop(done)
            found.setdefault(arm, {}).setdefault(name, {})[seed] = done.result()
            left.pop((arm, name, seed))
            if name == "pretraining":
                tune(arm, seed)
            rest = sum(left.values())
            minutes = (time.monotonic() - began) / 60 * rest / max(1e-9, total - rest)
            print(f"{arm} {name} {seed} done; {rest / total:.0%} left, about {minutes:.0f} min", flush=True)
    return found


def inside(figures: dict[str, Any], path: tuple[str, ...]) -> float:
    """A figure by its names."""
    value: Any = figures
    for name in path:
        value = value[name]
    return value


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel per task: the arms, a dot per seed; the floor; published figures that fit in the picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
    arms = [NEITHER, *ARMS]
    for axes, (name, task) in zip(panels.flat, TASKS.items(), strict=True):
        for place, arm in enumerate(arms):
            values = [task.times * inside(own["figures"], task.score) for own in found[arm][name].values()]
            axes.bar(place, statistics.mean(values), color="#c9c9c9" if arm == NEITHER else "#9db8d9", width=0.65)
            axes.plot([place] * len(values), values, "o", color="#1f3a5f", markersize=3)
        first = next(iter(found[NEITHER][name].values()))["figures"]
        lines = [("floor", *[task.times * inside(first, task.floor)] * 2), *task.published]
        for told, low, high in lines:
            axes.axhspan(
                low, high, color="#b5473a" if told == "floor" else "#777777", alpha=0.7 if low == high else 0.2
            )
            axes.annotate(told, (1.02, high), xycoords=("axes fraction", "data"), fontsize=7, va="center")
        bottom = task.times * inside(first, task.floor) - 3 if task.score == ("accuracy",) else 0
        axes.set_ylim(bottom=min(bottom, *axes.get_ylim()))
        axes.set_xticks(range(len(arms)), arms, fontsize=8)
        axes.set_title(task.title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Data, costs of steps, all arms and tasks, the plot and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/study_transfer"))
    parser.add_argument("--budget", type=float, default=300.0, help="CPU seconds of pre-training of an arm")
    parser.add_argument("--seeds", type=int, default=1, help="of pre-training and of tuning")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--record", action="store_true", help="write results/study-transfer-DATE.json")
    given = parser.parse_args()
    given.budget = 4.0 if given.smoke else given.budget
    given.out = given.out.resolve()
    prepare(given.data, given.out)
    began = time.time()
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        costs = pool.submit(seconds_per_step, given).result()
        found = everything(given, costs, pool)
    draw(found, given.out / "transfer.png")
    result = {
        "benchmark": "study_transfer", "budget": given.budget, "step_seconds": costs,
        "wall_seconds": round(time.time() - began), "arms": found,
    }  # fmt: skip
    if given.record:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = Path(__file__).parent / "results" / f"study-transfer-{date}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
