"""Everything once, on embedded data: train ``beit3.quick``, measure it on scenes it never saw, show what it does.

The folder is that of the run, and beside it ``scenes/`` (the held-out pictures as files, with their captions),
``store/`` (their vectors, for ``multiway search``), ``result.json`` and ``report.html``. Started again, it continues; a
run that is complete is only shown again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from multiway import config, pretrained, recipes
from multiway.data.loader import iterate
from multiway.engine.log import CONSOLE
from multiway.engine.train import Job, train
from multiway.errors import ConfigError
from multiway.nn.quantize import PatchCodebook
from multiway.pretrained import Pretrained
from multiway.recipes.pictures import IMAGE_TOKENIZER
from multiway.report import page
from multiway.report.examples import Examples, collect
from multiway.run import Run
from multiway.search.embed import embed
from multiway.search.store import MANIFEST, read_manifest
from multiway.types import Batch
from multiway.weights.io import write

RECIPE = "beit3.quick"

THREADS = (1, 2, 4, 8)
"""Numbers of CPU threads that are tried; more do not help so small a model."""

BF16_GAIN = 0.85
"""Share of fp32's time below which bf16 is taken."""

TRAINING_SECONDS, OVERHEAD, MOST_STEPS = 160, 1.3, 1500
"""Time the steps should fit into; what loading, the update and logs add to forward and backward; and steps at most."""

ROUNDS = 4
"""Training steps timed for each of them, every one on another batch: kernels are prepared anew for other lengths."""

QUERY = "a red three above a blue seven"


def run(out: Path, seed: int, steps: int | None) -> None:
    """Train or continue in ``out``, evaluate, and write the report; ``steps``: None = the run's or the recipe's own.

    Raises ConfigError when ``steps`` are fewer than the run has made, otherwise as
    `multiway.engine.train.train`.
    """
    settings, module = settle(out, seed, steps)
    result = finished(out, settings)
    if result is None:
        settings, figures = fit(settings, module, out, steps)
    else:
        figures = {name: result[name] for name in ("retrieval", "zero_shot", "masked")}
        CONSOLE.print(f"{out} is complete, {result['steps']:,} steps: making its report again")
    ready = pretrained.load(out / "final")
    CONSOLE.print("filling in hidden patches and words")
    examples = collect(ready, read_codebook(ready, out / "final"), figures["retrieval"]["candidates"], settings.seed)
    rows = read_metrics(out)
    if result is None:
        result = describe(settings, figures, examples, ready, rows)
        write(out / "result.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    store_scenes(ready, examples, out)
    report = out / "report.html"
    commands = next_commands(out, settings)
    page.write(report, result=result, examples=examples, rows=rows, run=settings, commands=commands)
    conclude(result, report, commands)


# ------------------------------------------------------------------------------------------------------------- training


def settle(out: Path, seed: int, steps: int | None) -> tuple[Run, ModuleType]:
    """The settings of the run in a folder, those of the recipe where there is none; and the module that builds it."""
    settings, module = recipes.recipe(RECIPE)
    if (out / "run.json").exists():
        settings = config.apply(settings, config.read(out / "run.json"))
    if settings.recipe != RECIPE or settings.data.root is not None:
        raise ConfigError(f"{out} is a run of {settings.recipe} on {settings.data.root}: take another --out")
    done = max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)
    if steps is not None and steps < done:
        raise ConfigError(f"{out} has made {done} steps already, more than --steps {steps}: take another --out")
    schedule = dataclasses.replace(settings.schedule, steps=settings.schedule.steps if steps is None else steps)
    return dataclasses.replace(settings, seed=seed, schedule=schedule), module


def finished(out: Path, settings: Run) -> dict[str, Any] | None:
    """The result of a run that needs no further step; it is written when training and evaluation are over."""
    path = out / "result.json"
    if not (path.exists() and (out / "final" / pretrained.CONFIG).exists()):
        return None
    result = json.loads(path.read_text())
    same = (result["steps"], result["seed"]) == (settings.schedule.steps, settings.seed)
    return result if same else None


def fit(settings: Run, module: ModuleType, out: Path, steps: int | None) -> tuple[Run, dict[str, Any]]:
    """Train to the last step; the settings with what the probe found, and the figures of the evaluation."""
    most, chosen = torch.get_num_threads(), settings.parallel.threads
    torch.set_num_threads(chosen or 1)  # safe on any machine, until it is known how busy this one is
    CONSOLE.print("rendering scenes of real handwriting")
    job = module.build(settings, out)
    if chosen is None:
        settings = probe(settings, job, most, steps)
    size = sum(x.numel() for x in job.objective.parameters())
    CONSOLE.print(f"training {RECIPE}: {size:,} parameters, {settings.schedule.steps:,} steps, in {out}")

    def evaluate(model: torch.nn.Module) -> dict[str, Any]:
        CONSOLE.print("evaluating on held-out scenes by other writers")
        return job.evaluate(model) if job.evaluate else {}

    told = dataclasses.replace(job, evaluate=evaluate)
    return settings, train(settings, lambda _: told, out, change=("schedule.steps",))


def probe(settings: Run, job: Job, most: int, steps: int | None) -> Run:
    """The settings with the threads, the precision and the number of steps that suit this machine now.

    bf16 is taken where it is clearly faster (processors that compute in it). ``steps``: None = as many as fit into
    TRAINING_SECONDS, between the recipe's and MOST_STEPS.
    """
    if torch.cuda.is_available():
        return dataclasses.replace(settings, parallel=dataclasses.replace(settings.parallel, threads=most))
    drawn = (batch for batch, _ in iterate(job.batches, range((len(THREADS) + 1) * (ROUNDS + 2))))
    threads, fp32 = fastest(job, drawn, most)
    torch.set_num_threads(threads)
    bf16 = statistics.median(step_seconds(job, next(drawn), learn=True, bf16=True) for _ in range(ROUNDS))
    precision = "bf16" if bf16 < BF16_GAIN * fp32 else "fp32"
    job.objective.zero_grad(set_to_none=True)
    if steps is None:
        fit_in = int(TRAINING_SECONDS / (min(bf16, fp32) * OVERHEAD))
        steps = min(max(fit_in // 100 * 100, settings.schedule.steps), MOST_STEPS)
    CONSOLE.print(f"{threads} threads, {precision} ({1 / bf16:.1f} steps/s in bf16, {1 / fp32:.1f} in fp32)")
    parallel = dataclasses.replace(settings.parallel, threads=threads, precision=precision)
    schedule = dataclasses.replace(settings.schedule, steps=steps)
    return dataclasses.replace(settings, parallel=parallel, schedule=schedule)


def step_seconds(job: Job, batch: Batch, *, learn: bool, bf16: bool = False) -> float:
    """Seconds of a batch's forward, and of its backward if ``learn``; weights stay as they are."""
    totals = {name: float(count) for name, count in job.objective.counts(batch).items()}
    begun = time.perf_counter()
    with torch.set_grad_enabled(learn), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = job.objective(batch, totals).loss
    if learn:
        loss.backward()
    return time.perf_counter() - begun


def fastest(job: Job, drawn: Iterator[Batch], most: int) -> tuple[int, float]:
    """The number of CPU threads, at most ``most``, that makes a training step shortest now; and its seconds.

    Threads wait for each other at every operation: on a machine that has other work two can be many times slower than
    one. So each number is tried on a prediction first, and dropped when that takes twice as long as with fewer.
    """
    counts = [count for count in THREADS if count <= most]

    def seconds(count: int, *, learn: bool) -> float:
        torch.set_num_threads(count)
        return step_seconds(job, next(drawn), learn=learn)

    seconds(1, learn=True)  # warms up
    trials = {count: seconds(count, learn=False) for count in counts}
    tried = [count for count in counts if trials[count] < 2 * trials[1]]
    steps: dict[int, list[float]] = {count: [] for count in tried}
    for _ in range(ROUNDS):
        for count in tried:
            steps[count].append(seconds(count, learn=True))
    job.objective.zero_grad(set_to_none=True)
    medians = {count: statistics.median(own) for count, own in steps.items()}
    best = min(medians, key=medians.__getitem__)
    told = [f"{count}: {1 / medians[count]:.1f} steps/s" if count in medians else f"{count}: slow" for count in counts]
    CONSOLE.print(f"CPU threads, {', '.join(told)}; taking {best}")
    return best, medians[best]


# --------------------------------------------------------------------------------------------------------------- result


def read_codebook(ready: Pretrained, folder: Path) -> PatchCodebook:
    """The image tokenizer a model was trained with."""
    shape: Any = ready.model.config
    book = PatchCodebook(shape.codes, shape.patch)
    book.load_state_dict(load_file(folder / IMAGE_TOKENIZER))
    return book


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """One row a step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def describe(
    settings: Run, figures: Mapping[str, Any], examples: Examples, ready: Pretrained, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of ``result.json``: the evaluation's figures, how they came about, and on what."""
    seconds = sum(row["seconds"] for row in rows)
    rate = len(rows) / max(seconds, 1e-9)
    items = settings.data.images + settings.data.texts + settings.data.pairs
    commit, changed = source_version()
    return {
        **figures,
        "fusion": {
            "image_code_accuracy": {"alone": examples.pictures.right, "with_caption": examples.pictures.right_told},
            **{
                f"{name[:-1]}_accuracy": {"alone": alone, "with_picture": told}
                for name, (alone, told) in examples.words.right.items()
            },
        },
        "seconds": seconds,
        "steps": settings.schedule.steps,
        "steps_per_second": rate,
        "samples_per_second": rate * items,
        "threads": settings.parallel.threads,
        "parameters": sum(x.numel() for x in ready.model.parameters()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": settings.seed,
        "commit": commit,
        "source_changed": changed,
    }


def machine() -> str:
    """Processor, number of CPUs and system."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}"


def source_version() -> tuple[str | None, bool | None]:
    """Commit of the source tree, and whether its files were changed since; None where this is not a git checkout."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() / "src" / package.name != package:
            return None, None  # installed into an environment that lies in another project's checkout
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "."))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def store_scenes(ready: Pretrained, examples: Examples, out: Path) -> None:
    """Write the held-out scenes as files with their captions, and their vectors as a store."""
    scenes, lines = out / "scenes", []
    scenes.mkdir(exist_ok=True)
    for i, caption in enumerate(examples.captions):
        name = f"{i:06d}.png"
        Image.fromarray(examples.scenes.images[i].transpose(1, 2, 0)).save(scenes / name)
        lines.append(json.dumps({"image": name, "caption": caption}) + "\n")
    write(scenes / "captions.jsonl", lambda path: path.write_text("".join(lines)))
    store = out / "store"
    if (store / MANIFEST).exists() and read_manifest(store)["fingerprint"] != ready.fingerprint:
        shutil.rmtree(store)  # vectors of the model as it was before further training
    embed(scenes, ready, store)


# ----------------------------------------------------------------------------------------------------------------- end


def next_commands(out: Path, settings: Run) -> list[tuple[str, str]]:
    """What to try next: purpose and command."""
    start, folder = program(), shlex.quote(str(out))
    own = "" if out == Path("runs/quickstart") else f" --out {folder}"
    more = 2 * settings.schedule.steps
    return [
        ("Search the held-out scenes by words.", f'{start} search "{QUERY}" --store {folder}/store'),
        ("Search by a picture.", f"{start} search {folder}/scenes/000007.png --store {folder}/store"),
        ("Train on, from where this run ended, and look again.", f"{start} quickstart --steps {more}{own}"),
        (
            "Train on your own pictures: a folder of them with a .txt of captions beside each, a .csv or a .jsonl "
            f"({out}/scenes is an example).",
            f"{start} train {RECIPE} --data.root DIR --out runs/mine",
        ),
        ("See every setting, and change any of them.", f"{start} show {RECIPE}"),
    ]


def program() -> str:
    """How multiway is started from here: its name where that is found, else the path of its script or interpreter."""
    script = Path(sys.executable).with_name("multiway")
    found = shutil.which("multiway")
    if found and Path(found) == script:
        return "multiway"
    path = script if script.exists() else Path(sys.executable)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path)) + ("" if script.exists() else " -m multiway")


def conclude(result: Mapping[str, Any], report: Path, commands: list[tuple[str, str]]) -> None:
    """Print the figures beside chance, where the report is, and what to try next."""
    found, named, masked = result["retrieval"], result["zero_shot"], result["masked"]
    count = found["candidates"]
    lines = [
        ("a caption finds its picture (recall@1)", found["text_to_image"]["r1"], 1 / count),
        ("a picture finds its caption (recall@1)", found["image_to_text"]["r1"], 1 / count),
        ("a digit is named, zero-shot", named["accuracy"], named["chance"]),
        ("a hidden word is filled in", masked["text_token_accuracy"], masked["text_token_trivial"]),
        ("a hidden patch's visual token is named", masked["image_code_accuracy"], masked["image_code_trivial"]),
    ]
    print(
        f"\n{count:,} held-out scenes by other writers, after {result['steps']:,} steps in {result['seconds']:.0f} s "
        f"({result['samples_per_second']:,.0f} samples/s):\n\n{'':42}{'model':>8}{'chance':>9}"
    )
    for name, value, chance in lines:
        print(f"  {name:40}{value:8.1%}{chance:9.1%}")
    print("  (chance of the last two: always the commonest answer)\n")
    print(f"Report: {report}\n")
    for why, command in commands:
        print(f"{why}\n  {command}")
