"""How the loss of pre-training scales with compute, data and parameters, and where more steps make it worse.

Of your runs, and of the study of masked image modelling whose 63 points were published with SimMIM's models.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from multiway import config, recipes
from multiway.data.order import generator
from multiway.data.prepare import digit_corpus, open_corpus
from multiway.diagnose.page import Ink, Report, facts, logarithmic, marked, number, paragraph, section, table
from multiway.errors import ConfigError, DataError
from multiway.estimate import KINDS, forward_flops
from multiway.metrics.scaling import FEWEST, PowerLaw, fit_power_law, frontier, spearman
from multiway.rehearsal import Stage
from multiway.run import Run

PUBLISHED = "simmim_scaling.csv"
PUBLISHED_BATCH = 2048
SOURCE = "microsoft/Swin-Transformer, MODELHUB.md (Xie et al., On Data Scaling in Masked Image Modeling)"
LAST = 0.1
"""Share of a run's steps, the last ones, whose mean is its training loss."""

AXES = {"compute": ("parameters", "data"), "pictures": ("parameters", "steps"), "parameters": ("data", "steps")}
"""What losses are drawn against -> what is the same along a line."""


@dataclass(frozen=True)
class Point:
    """A model that was pre-trained once.

    ``parameters``: of its encoder; ``data``: name of what it saw, ``pictures`` different ones; ``compute``: see
    `Study`; ``accuracy``: after fine-tuning, in percent, None = not known.
    """

    name: str
    parameters: int
    data: str
    pictures: int
    steps: int
    compute: float
    loss: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Study:
    """Points whose losses can be compared; ``compute``, ``loss``: what these are, with units."""

    title: str
    points: Sequence[Point]
    compute: str
    loss: str

    def column(self, name: str) -> np.ndarray:
        """A quantity of all points."""
        return np.array([getattr(point, name) for point in self.points], dtype=float)


def run(out: Path, folders: Sequence[Path], *, published: bool = False) -> Path:
    """Study the runs in ``folders``, the published points, or both one after the other; returns the page's path.

    Raises ConfigError for neither, and for runs whose losses cannot be compared.
    """
    if not folders and not published:
        raise ConfigError("nothing to study: name run folders, or ask for the published points with --published")
    report = Report(out)
    studies = {"runs": of_runs(folders)} if folders else {}
    if published:
        studies["published"] = of_publication()
    sections, figures, told = [], {}, []
    for key, study in studies.items():
        laws = {axis: law_of(study, axis) for axis in AXES}
        worse = rises(study.points)
        figures[key] = {
            "points": [dataclasses.asdict(point) for point in study.points],
            "laws": {axis: law and law.figures() for axis, law in laws.items()},
            "rises": [(before.name, after.name) for before, after in worse],
        }  # fmt: skip
        sections += [curves_section(report, key, study, laws, worse), rises_section(key, worse, study)]
        told.append(f"{study.title}: {len(study.points)} points, {len(worse)} of them worse than with fewer steps")
        if all(point.accuracy is not None for point in study.points):
            correlated = correlations(study)
            figures[key]["spearman"] = correlated
            sections.append(accuracy_section(report, key, study, correlated))
    lead = (
        "The loss of pre-training against compute, data and parameters, with the power law that the best points follow."
    )
    law = (
        "loss = a x^-b + c, a and c at least 0, b from 0.01 to 3; Huber’s loss; 90 % intervals from resampled residuals"
    )
    sections.append(facts({"Law": law, **({"Published points": SOURCE} if published else {})}))
    return report.finish("How losses scale", lead, sections, figures, "; ".join(told))


# ---------------------------------------------------------------------------------------------------------------- data


def of_publication() -> Study:
    """The 63 points of the study of SimMIM's authors: Swin V2 in five sizes. Source: vision.md 7.7."""
    with Path(__file__).with_name(PUBLISHED).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    points = []
    for row in rows:
        parameters, steps = int(row["parameters"]), int(row["steps"])
        name = f"{row['size']}, {row['data']}, {steps // 1000}k steps"
        points.append(Point(
            name, parameters, row["data"], int(row["pictures"]), steps, float(parameters * steps * PUBLISHED_BATCH),
            float(row["loss"]), float(row["accuracy"]),
        ))  # fmt: skip
    return Study("published study", points, "parameters × pictures seen", "validation loss of SimMIM, Swin V2")


def of_runs(folders: Sequence[Path]) -> Study:
    """Runs of one system. Raises ConfigError where they are of several, or some have a held-out loss and some not."""
    read = [read_run(folder) for folder in folders]
    systems = sorted({run.recipe.partition(".")[0] for run, _, _ in read})
    if len(systems) > 1:
        raise ConfigError(
            f"runs of {' and '.join(systems)} have losses that cannot be compared: name runs of one system"
        )
    without = [str(folder) for folder, (_, _, held_out) in zip(folders, read, strict=True) if not held_out]
    if without and len(without) < len(folders):
        raise ConfigError(
            f"{', '.join(without)} measured no held-out pictures, the other runs did: finish it, or leave it out"
        )
    kind = "training loss (no held-out pictures)" if without else "held-out loss"
    return Study("your runs", [point for _, point, _ in read], "training FLOPs", f"{kind} of {systems[0]}")


def read_run(folder: Path) -> tuple[Run, Point, bool]:
    """A run's settings, its point, and whether its loss is of held-out pictures."""
    saved = config.read(folder / "run.json")
    usual, module = recipes.recipe(saved["recipe"])
    own: Run = config.apply(usual, saved)
    steps, loss, held_out = final_loss(folder)
    stage = Stage(own, module.assemble, {}, devices=1, gpu=False)
    items = {kind: n for kind, name in KINDS.items() if (n := getattr(own.data, name))}
    forward = forward_flops(stage, items)
    compute = 3 * steps * sum(forward[kind] * n for kind, n in items.items())
    parameters = sum(parameter.numel() for parameter in stage.objective.model.encoder.parameters())
    if own.data.root is None:
        data, pictures = "embedded scenes", embedded_pictures(own.seed)
    else:
        corpus = open_corpus(own.data, folder / "index")
        data, pictures = own.data.root, sum(len(source) for source in corpus.sources["image"])
    return own, Point(folder.name, parameters, data, pictures, steps, compute, loss), held_out


@cache
def embedded_pictures(seed: int) -> int:
    """Embedded scenes that pictures alone are trained on."""
    return len(digit_corpus(seed).sources["image"][0])


def final_loss(folder: Path) -> tuple[int, float, bool]:
    """A run's last step, its loss, and whether that is of held-out pictures or of the last training steps.

    Raises DataError for a run that left no loss.
    """
    evaluated = [row for row in read_lines(folder / "eval.jsonl") if "pre-training" in row]
    if evaluated:
        terms = evaluated[-1]["pre-training"]
        loss = sum(value for name, value in terms.items() if "/" not in name and name != "pictures")
        return evaluated[-1]["step"], loss, True
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row.get("loss") is not None]
    if not rows:
        raise DataError(f"{folder} has no loss in eval.jsonl or metrics.jsonl: train it first")
    last = rows[-max(1, int(LAST * len(rows))) :]
    return rows[-1]["step"], float(np.mean([row["loss"] for row in last])), False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, none where there is no file. Raises DataError for a line that is no JSON."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: a line is not JSON ({error}); was the run cut short? Resume it") from error


# ------------------------------------------------------------------------------------------------------------ findings


def best_of(study: Study, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """The best points along an axis, by it, and their losses: of every size or number of pictures the best; of compute
    those that no point with less of it reaches.
    """
    x, loss = study.column(axis), study.column("loss")
    if axis == "compute":
        best = frontier(x, loss)
        return x[best], loss[best]
    values = np.unique(x)
    return values, np.array([loss[x == value].min() for value in values])


def law_of(study: Study, axis: str) -> PowerLaw | None:
    """The law of the best points along an axis; None where they are too few."""
    x, loss = best_of(study, axis)
    return fit_power_law(x, loss, generator(0, "scaling", axis)) if len(x) >= FEWEST else None


def rises(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Over-fitting: pairs of points, the second with the next more steps, all else equal, and a higher loss."""
    found = []
    kept: dict[tuple[Any, ...], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.steps):
        kept.setdefault((point.parameters, point.data, point.pictures), []).append(point)
    for own in kept.values():
        found += [(a, b) for a, b in zip(own, own[1:], strict=False) if b.steps > a.steps and b.loss > a.loss]
    return found


def correlations(study: Study) -> dict[str, float]:
    """Rank correlation of loss and accuracy, over all points and within every size."""
    loss, accuracy, sizes = (study.column(name) for name in ("loss", "accuracy", "parameters"))
    within = {short(size): spearman(loss[sizes == size], accuracy[sizes == size]) for size in np.unique(sizes)}
    return {"all": spearman(loss, accuracy), **within}


def short(count: float) -> str:
    """A number of parameters or pictures, with a letter for its size."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return f"{count:g}"


# ------------------------------------------------------------------------------------------------------------ sections


def curves_section(
    report: Report,
    key: str,
    study: Study,
    laws: Mapping[str, PowerLaw | None],
    worse: Sequence[tuple[Point, Point]],
) -> str:
    """Loss against each axis, and the laws."""

    def draw(figure: Any, ink: Ink) -> None:
        axes = figure.subplot_mosaic([["compute", "compute"], ["pictures", "parameters"]])
        labels = {"compute": study.compute, "pictures": "different pictures", "parameters": "parameters of the encoder"}
        sizes = np.unique(study.column("parameters"))
        colours = dict(zip(sizes, ink.ordered(len(sizes)), strict=True))
        for name, label in labels.items():
            lines(axes[name], ink, study.points, name, colours)
            for _, point in worse:
                axes[name].plot(getattr(point, name), point.loss, "o", ms=9, mfc="none", mec=ink.series[1], mew=1.3)
            if (law := laws[name]) is not None:
                best = best_of(study, name)[0]
                x = np.geomspace(best[0], best[-1], 100)
                axes[name].fill_between(x, *law.band(x), color=ink.text, alpha=0.12, lw=0)
                axes[name].plot(x, law(x), "--", color=ink.text, lw=1.4)
            axes[name].set(xscale="log", xlabel=label, ylabel="loss")
            logarithmic(axes[name].xaxis, short if name != "compute" else lambda x: number(x, 2).replace(".0", ""))
        named = [axes["compute"].plot([], [], "o", color=colours[size], label=short(size))[0] for size in sizes]
        named.append(axes["compute"].plot([], [], "--", color=ink.text, lw=1.4, label="power law of the best")[0])
        if worse:
            ring = {"mfc": "none", "mec": ink.series[1], "mew": 1.3}
            named.append(axes["compute"].plot([], [], "o", ms=9, label="worse than with fewer steps", **ring)[0])
        figure.legend(handles=named, loc="outside upper left", ncols=len(named), title="parameters", alignment="left",
                      columnspacing=1.2, handletextpad=0.4)  # fmt: skip

    plot = report.plot(
        f"{key}-loss", draw, 7.4, "loss against compute, different pictures and parameters",
        f"Loss: {escape(study.loss)}. Lines join points that differ in nothing else; shaded: 90 % of the resampled "
        "laws.",
    )  # fmt: skip
    heads = ("loss against", "a", "b", "90 %", "c", "90 %", "points")
    rows = [law_row(study, axis, law) for axis, law in laws.items()]
    text = (
        "The law is that of the best points alone: against compute those that no point with less of it reaches, else "
        f"the best of every value. It needs {FEWEST} of them. A wide interval of b says that they do not determine it."
    )
    return section(key, f"Loss of {study.title}", plot, paragraph(text), table(heads, rows))


def lines(axes: Any, ink: Ink, points: Sequence[Point], axis: str, colours: Mapping[float, Any]) -> None:
    """Points coloured by size, joined where they differ in nothing but the axis (and compute in steps)."""
    kept: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        kept.setdefault(tuple(getattr(point, name) for name in AXES[axis]), []).append(point)
    for own in kept.values():
        own.sort(key=lambda point: getattr(point, axis))
        x, loss = [getattr(point, axis) for point in own], [point.loss for point in own]
        axes.plot(x, loss, "-", lw=0.8, color=ink.soft, alpha=0.5)
        axes.scatter(x, loss, s=22, color=[colours[point.parameters] for point in own], zorder=3)


def law_row(study: Study, axis: str, law: PowerLaw | None) -> list[str]:
    """A law as a row of the table."""
    name = study.compute if axis == "compute" else axis
    count = str(len(best_of(study, axis)[0]))
    if law is None:
        return [name, "–", "–", "", "–", "", f"{count}, too few"]
    (_, (b_low, b_high), (c_low, c_high)) = law.intervals().values()
    return [name, number(law.a), number(law.b), f"{number(b_low)} to {number(b_high)}", number(law.c),
            f"{number(c_low)} to {number(c_high)}", count]  # fmt: skip


def rises_section(key: str, worse: Sequence[tuple[Point, Point]], study: Study) -> str:
    """Where more steps made the loss worse."""
    title = f"Over-fitting of {study.title}"
    if not worse:
        text = "No point is worse than one with fewer steps and all else equal: nothing over-fits yet."
        return section(f"{key}-rises", title, paragraph(text))
    text = (
        "With too few different pictures the held-out loss rises when steps are doubled, the earlier the larger the "
        "model. The training loss does not show it."
    )
    rows = [
        [short(after.parameters), escape(after.data), f"{before.steps:,} to {after.steps:,}", f"{before.loss:.4f}",
         marked(f"{after.loss:.4f}", "bad"), f"+{after.loss - before.loss:.4f}"]
        for before, after in sorted(worse, key=lambda pair: (pair[1].pictures, pair[1].parameters, pair[1].steps))
    ]  # fmt: skip
    heads = ("parameters", "data", "steps", "loss before", "after", "rise")
    return section(f"{key}-rises", title, paragraph(text), table(heads, rows))


def accuracy_section(report: Report, key: str, study: Study, correlated: Mapping[str, float]) -> str:
    """Whether the loss foretells what fine-tuning will give."""

    def draw(figure: Any, ink: Ink) -> None:
        axes = figure.subplots()
        sizes = study.column("parameters")
        for size, colour in zip(np.unique(sizes), ink.ordered(len(np.unique(sizes))), strict=True):
            own = sizes == size
            axes.scatter(
                study.column("loss")[own], study.column("accuracy")[own], s=24, color=colour, label=short(size)
            )
        axes.set(xlabel="validation loss of pre-training", ylabel="accuracy after fine-tuning, %")
        axes.legend(title="parameters")

    plot = report.plot(f"{key}-accuracy", draw, 4.4, "accuracy after fine-tuning against validation loss")
    rows = [[name if name == "all" else f"{name} parameters", f"{value:.3f}"] for name, value in correlated.items()]
    texts = (
        "A lower validation loss of pre-training goes with a higher accuracy after fine-tuning, so that it can stand "
        "for it while models are compared.",
        "On all of ImageNet-1k nothing over-fits, and the fourteen million pictures of ImageNet-22k are no better. The "
        "authors’ own reading changed: their first preprint says that larger models trained for longer need more data, "
        "the published abstract that masked image modelling does not profit from more data where it does not over-fit.",
    )
    heads = ("points", "Spearman’s rank correlation")
    return section(f"{key}-accuracy", "Loss and accuracy", *map(paragraph, texts), plot, table(heads, rows))
