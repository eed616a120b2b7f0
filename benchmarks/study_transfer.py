"""What pre-training does for the tasks a small encoder is used for, at equal compute.

One BEiT-3 is pre-trained on photographs with captions in two languages, emoji with their names in thirty, and plain
texts: by hiding, by contrast, by both, or not at all. Then it is tuned to eight tasks, every time with the same recipe,
steps and seed; the one that was not pre-trained shares that time out among the tasks as more steps of tuning. Steps
follow from CPU seconds per step, measured first. ``DATA`` is a folder with the sets flickr8k-224, nlvr1, text-small and
emoji-noto, packed or not. Runs continue where they were left; the last line is one JSON object, and ``transfer.png`` is
drawn.

    python benchmarks/study_transfer.py DATA [--out runs/study_transfer] [--seeds 1] [--jobs 2] [--smoke] [--record]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import re
import shutil
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial, reduce
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
    "dim": 128, "depth": 3, "heads": 4, "hidden": 384, "image_px": 96, "vocab": VOCAB, "text_positions": 66,
    "drop_path": 0.05, "init_std": 0.12,
}  # fmt: skip
STEP = {"images": 32, "texts": 32, "pairs": 128}
ARMS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "masked": (beit3.Masked(), {"codes": 512, "contrast": False}, STEP),
    "contrast": (beit3.Contrast(), {"masked": False, "codes": 0}, {"pairs": 256}),
    "both": (beit3.Masked(contrast=True, joint=0.25), {"codes": 512}, STEP),
}
"""Ways to pre-train: objective, heads, what a step is made of."""
NEITHER = "neither"
PROBE = 8  # steps measured of every kind; the first quarter is not counted
HELD_OUT = 5  # one emoji of so many
SMOKE = 4  # steps of tuning, and CPU seconds of pre-training, of a trial


class Task(NamedTuple):
    """Title, data, steps of tuning, recipe; the names of the figure that is drawn; what others published, as name,
    least, greatest."""

    title: str
    data: str
    steps: int
    recipe: Callable[[], Run]
    score: tuple[str, ...]
    published: tuple[tuple[str, float, float], ...] = ()


FOUND = ("text_to_image", "r10")
TASKS = {
    "retrieval_en": Task("Flickr8k, English: recall@10, %", "english", 200, beit3.quick_retrieval, FOUND),
    "retrieval_zh": Task("Flickr8k, Chinese: recall@10, %", "chinese", 200, beit3.quick_retrieval, FOUND),
    "retrieval_emoji": Task("Emoji, 30 languages: recall@10, %", "emoji", 200, beit3.quick_retrieval, FOUND),
    "captioning_en": Task("Flickr8k, English: CIDEr-D", "english", 200, beit3.quick_captioning, ("cider_d",)),
    "captioning_zh": Task("Flickr8k, Chinese: CIDEr-D", "chinese", 200, beit3.quick_captioning, ("cider_d",)),
    "nlvr1": Task(
        "NLVR1: accuracy, %", "nlvr1", 300, beit3.quick_nlvr2, ("accuracy",),
        (("text only", 56.6, 56.6), ("modules", 63.1, 63.1), ("CNN-BiATT", 66.9, 66.9)),
    ),
    "sst2": Task(
        "SST-2: accuracy, %", "sst2", 200, beit3.quick_text_classification, ("accuracy",),
        (("bag of words", 80, 80), ("CNN", 87, 87), ("BERT-base", 93.5, 93.5)),
    ),
    "cola": Task(
        "CoLA: Matthews correlation, %", "cola", 200, beit3.quick_text_classification, ("matthews",),
        (("LSTM", 20, 35), ("BERT-base", 52, 60)),
    ),
}  # fmt: skip
"""Published figures are those that the descriptions of the data recall; NLVR1's saw twelve times as many sentences."""


# ------------------------------------------------------------------------------------------------------------ the data


def unpack(data: Path, raw: Path) -> None:
    """Copy the sets, or what their archives hold, to one folder."""
    for name in SETS:
        if (raw / name).is_dir():
            continue
        aside = raw / f".tmp-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        archives = sorted((data / name).glob("*.tar.xz"))
        for archive in archives:
            with tarfile.open(archive) as file:
                file.extractall(aside, filter="data")
        if not archives:
            shutil.copytree(data / name, aside / name)
        (aside / name).rename(raw / name)


def rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def letters(text: str) -> str:
    """A text without signs, spaces and capitals."""
    return re.sub(r"[\W_]", "", text.lower())


def texts(folder: Path, held_out: set[str]) -> Iterator[str]:
    """Texts without labels: Wikipedia, captions in four languages line by line, sentences of the tasks to come.

    Flickr30k, which the captions are of, has the pictures of Flickr8k: captions that are ``held_out`` are left out.
    """
    yield from filter(str.strip, (folder / "wikitext2_valid.txt").read_text().splitlines())
    languages = [(folder / "multi30k" / f"train.{name}").read_text().splitlines() for name in ("en", "de", "fr", "cs")]
    yield from (text for same in zip(*languages, strict=True) if letters(same[0]) not in held_out for text in same)
    yield from (line.split("\t")[0] for line in (folder / "sst2" / "train.tsv").read_text().splitlines())
    yield from (line.split("\t")[3] for line in (folder / "cola" / "in_domain_train.tsv").read_text().splitlines())


def tables(raw: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of the pre-training and of pictures with captions, by name and split."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {("emoji", "train"): [], ("emoji", "val"): []}
    for row in rows(raw / "emoji-noto" / "train.jsonl"):
        held_out = hashlib.sha256(row["codepoints"].encode()).digest()[0] % HELD_OUT == 0
        own = {"image": f"emoji-noto/{row['image']}", "captions": list(row["names"].values())}
        found["emoji", "val" if held_out else "train"].append(own)
    fields = {"english": ["captions"], "chinese": ["captions_zh"], "all": ["captions", "captions_zh"]}
    for name in fields:
        for part in ("train", "val"):
            found[name, part] = [
                {
                    "image": f"flickr8k-224/{row['image']}",
                    "captions": [text for field in fields[name] for text in row[field]],
                }
                for row in rows(raw / "flickr8k-224" / f"{part}.jsonl")
            ]
    held_out = {letters(text) for row in found.pop(("all", "val")) for text in row["captions"]}
    plain = [{"text": text} for text in texts(raw / "text-small", held_out)]
    found["pretraining", "train"] = found.pop(("all", "train")) + found["emoji", "train"] + plain
    return found


def prepare(data: Path, out: Path) -> None:
    """Unpack, train the one tokenizer on all texts, and index everything, once."""
    raw = out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    unpack(data, raw)
    found = tables(raw)
    if not (out / "tokenizer.json").is_file():
        told = [text for row in found["pretraining", "train"] for text in row.get("captions", [row.get("text")])]
        TextTokenizer.train(told, VOCAB).save(out / "tokenizer.json")
    tokenizer = TextTokenizer.load(out / "tokenizer.json")

    def index(name: str, part: str, table: Path, task: str | None = None) -> None:
        if not (out / "index" / name / part / "manifest.json").is_file():
            build(table, out / "index" / name / part, tokenizer=tokenizer, window=64, task=task, progress=False)

    for (name, part), own in found.items():
        table = raw / f"{name}-{part}.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in own))
        index(name, part, table)
    for part, own in (("train", "train"), ("val", "dev")):
        index("nlvr1", part, raw / "nlvr1" / f"{own}.jsonl", "nlvr2")
        index("sst2", part, raw / "text-small" / "sst2" / f"{own}.tsv", "text_classification")
        index("cola", part, raw / "text-small" / "cola" / f"in_domain_{own}.tsv", "text_classification")


# ------------------------------------------------------------------------------------------------------------ the runs


def pretraining(given: argparse.Namespace, arm: str, cost: float | None = None) -> tuple[Run, Path]:
    """The run of an arm and its folder; ``cost``: CPU seconds of a step, None = not known yet."""
    objective, heads, items = ARMS[arm]
    run = beit3.photos()
    run = dataclasses.replace(
        run, objective=objective,
        model=dataclasses.replace(run.model, **SHAPE, **heads),
        data=Data(**items, image_scale=0.4, flip=False, jitter=0.2, text_tokens=40, window=64),
        optim=Optim(lr=2e-3, matrices="muon", weight_decay=0.1),
    )  # fmt: skip
    steps = PROBE if cost is None else max(2, round(given.budget / cost))
    return common(given, run, "pretraining", steps, 0), given.out / "pretrained" / arm


def tuning(given: argparse.Namespace, arm: str, name: str, seed: int, cost: float = 0.0) -> tuple[Run, Path]:
    """The run that tunes an arm to a task, and its folder; ``cost``: CPU seconds of a step, 0 = not known yet."""
    task = TASKS[name]
    run = task.recipe()
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **SHAPE),
        optim=dataclasses.replace(run.optim, layer_decay=1.0),  # less would hold back who starts from nothing
        init=None if arm == NEITHER else str(given.out / "pretrained" / arm / "final"),
    )
    more = given.budget / len(TASKS) / cost if cost and arm == NEITHER else 0.0
    steps = round((SMOKE if given.smoke else task.steps) + more)
    return common(given, run, task.data, steps, seed), given.out / "tuned" / f"{arm}-{name}-{seed}"


def common(given: argparse.Namespace, run: Run, data: str, steps: int, seed: int) -> Run:
    """What all runs have alike."""
    root, tokenizer = given.out / "index" / data / "train", given.out / "tokenizer.json"
    return dataclasses.replace(
        run, seed=seed,
        data=dataclasses.replace(run.data, root=str(root), tokenizer=str(tokenizer), vocab=VOCAB),
        schedule=Schedule(steps=steps, warmup=steps // 10),
        parallel=Parallel(precision="bf16", threads=1),
        checkpoint=Checkpoint(every=100, keep=1), log=Log(tensorboard=False),
    )  # fmt: skip


def seconds_per_step(given: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of one training step of every arm and every task, measured in turns, once."""
    path = given.out / "costs.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    runs = {arm: pretraining(given, arm)[0] for arm in ARMS}
    runs |= {name: tuning(given, NEITHER, name, 0)[0] for name in TASKS}
    jobs = {name: beit3.build(run, given.out / "probe" / name) for name, run in runs.items()}
    optimizers = {name: build_optimizers(job.objective, runs[name].optim) for name, job in jobs.items()}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(PROBE):
        for name, job in jobs.items():
            begun = time.process_time()
            batch, _ = job.batches.batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = job.objective(batch, job.objective.counts(batch)).loss
            loss.backward()
            for optimizer in optimizers[name]:
                optimizer.step()
            job.objective.zero_grad()
            costs[name].append(time.process_time() - begun)
    found = {name: round(statistics.median(values[PROBE // 4 :]), 4) for name, values in costs.items()}
    path.write_text(json.dumps(found))
    return found


def trained(run: Run, out: Path, measure: Callable[[Path], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Train and measure, unless that was done: steps, figures, CPU seconds of both."""
    torch.set_num_threads(1)
    done = out / "study.json"
    if not done.is_file():
        began = time.process_time()
        train(run, partial(beit3.build, out=out), out)
        ended = time.process_time()
        figures = measure(out / "final") if measure else {}
        spent = {"seconds": round(ended - began, 1), "measuring_seconds": round(time.process_time() - ended, 1)}
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        done.write_text(json.dumps({"steps": run.schedule.steps, **spent, "figures": figures}))
    return json.loads(done.read_text())


def measured(name: str, index: Path, most: int | None, folder: Path) -> dict[str, Any]:
    """Figures of a tuned model on what a task holds out; ``most``: pictures of Flickr8k, None = all."""
    model = pretrained.load(folder)
    if name == "retrieval_emoji":
        return by_language(model, index)
    if name.startswith("retrieval"):
        return evaluation.retrieval_of(model, Index.open(index).sources, most)
    if name.startswith("captioning"):
        unit = "characters" if name.endswith("zh") else "words"
        return evaluation.captioning_of(model, Index.open(index).sources, most, unit=unit)
    task = "nlvr2" if name == "nlvr1" else "text_classification"
    return answers.measure(model, open_examples(Data(root=str(index)), task, index), task, name)[0]


def by_language(model: pretrained.Pretrained, index: Path) -> dict[str, Any]:
    """Recall of emoji by their names among all that are held out: of every language, and their mean."""
    source = Index.open(index).sources[0]
    languages = list(rows(index.parents[2] / "raw" / "emoji-noto" / "train.jsonl")[0]["names"])
    numbers = np.arange(len(source))
    image = model.encode_image(source.image(i, model.source_px) for i in range(len(source))).numpy()
    told = [model.encode_text(own).numpy() for own in zip(*map(source.strings, range(len(source))), strict=True)]
    found = {name: recall(own, image, numbers, numbers) for name, own in zip(languages, told, strict=True)}
    mean = {k: statistics.mean(own[k] for own in found.values()) for k in ("r1", "r5", "r10")}
    floor = {"text_to_image": chance(numbers, numbers)}
    return {"candidates": len(numbers), "text_to_image": mean, "chance": floor, "languages": found}


# ----------------------------------------------------------------------------------------------------------- the study


def everything(given: argparse.Namespace, costs: dict[str, float], pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Pre-train, tune and measure all arms: what was found by arm, task (or ``pretraining``) and seed."""
    work: dict[Future[Any], tuple[str, str, int]] = {}
    left: dict[tuple[str, str, int], float] = {}
    found: dict[str, Any] = {}

    def tune(arm: str, start: bool) -> None:
        for seed, (name, task) in itertools.product(range(given.seeds), TASKS.items()):
            run, folder = tuning(given, arm, name, seed, costs[name])
            if not (folder / "study.json").is_file():
                left[arm, name, seed] = costs[name] * run.schedule.steps
            measure = partial(measured, name, given.out / "index" / task.data / "val", 20 if given.smoke else None)
            if start:
                work[pool.submit(trained, run, folder, measure)] = arm, name, seed

    for arm in ARMS:
        run, folder = pretraining(given, arm, costs[arm])
        work[pool.submit(trained, run, folder)] = arm, "pretraining", 0
        if not (folder / "study.json").is_file():
            left[arm, "pretraining", 0] = given.budget
        tune(arm, start=False)
    tune(NEITHER, start=True)
    total, began = sum(left.values()), time.monotonic()
    print(f"{len(left)} runs to go, {total / 60:.0f} CPU minutes of training", flush=True)
    while work:
        for done in wait(work, return_when=FIRST_COMPLETED).done:
            arm, name, seed = work.pop(done)
            found.setdefault(arm, {}).setdefault(name, []).append({"seed": seed, **done.result()})
            if name == "pretraining":
                tune(arm, start=True)
            if left.pop((arm, name, seed), None) is None:
                continue
            rest = sum(left.values())
            minutes = (time.monotonic() - began) / 60 * rest / (total - rest)
            print(f"{arm}, {name}, seed {seed}; {rest / total:.0%} left, about {minutes:.0f} minutes", flush=True)
    return found


def inside(figures: dict[str, Any], names: tuple[str, ...]) -> float:
    """One of the figures; shares as %, CIDEr-D as it is."""
    value: Any = reduce(lambda own, name: own[name], names, figures)
    return value if "cider_d" in names else 100 * value


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel per task: the arms, a dot per seed; the floor; published figures."""
    from matplotlib.figure import Figure

    figure, arms = Figure(figsize=(13.5, 6), layout="constrained"), [NEITHER, *ARMS]
    panels = figure.subplots(2, 4)
    for axes, (name, task) in zip(panels.flat, TASKS.items(), strict=True):
        floor = inside(found[NEITHER][name][0]["figures"], ("chance" if task.score == FOUND else "floor", *task.score))
        bottom = 10 * (floor // 10) if task.score == ("accuracy",) else 0
        for bar, arm in enumerate(arms):
            values = [inside(own["figures"], task.score) for own in found[arm][name]]
            mean = statistics.mean(values)
            axes.bar(bar, mean - bottom, bottom=bottom, color="#c9c9c9" if arm == NEITHER else "#9db8d9", width=0.65)
            axes.plot([bar] * len(values), values, "o", color="#1f3a5f", markersize=3)
        for told, low, high in (("floor", floor, floor), *task.published):
            colour = "#b5473a" if told == "floor" else "#8a8a8a"
            axes.axhspan(low, high, color=colour, alpha=0.2 if low < high else 1, linewidth=1 if low == high else 0)
            place = (1.01, (low + high) / 2)
            axes.annotate(told, place, xycoords=("axes fraction", "data"), fontsize=7, va="center", color=colour)
        axes.set_xticks(range(len(arms)), arms, fontsize=9)
        axes.set_title(task.title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Data, costs of steps, all arms and tasks, the plot and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/study_transfer"))
    parser.add_argument("--budget", type=float, default=360.0, help="CPU seconds of pre-training of an arm")
    parser.add_argument("--seeds", type=int, default=1, help="of tuning")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--record", action="store_true", help="write results/study-transfer-DATE.json")
    given = parser.parse_args()
    given.out, given.budget = given.out.resolve(), SMOKE if given.smoke else given.budget
    prepare(given.data, given.out)
    began = time.time()
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        costs = pool.submit(seconds_per_step, given).result()
        found = everything(given, costs, pool)
    draw(found, given.out / "transfer.png")
    spent = {"budget": given.budget, "step_seconds": costs, "wall_seconds": round(time.time() - began)}
    result = {"benchmark": "study_transfer", **spent, "arms": found}
    if given.record:
        path = Path(__file__).parent / "results" / time.strftime("study-transfer-%Y-%m-%d.json", time.gmtime())
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
