"""What the commands do: each calls one function of the library, and prints what it returns."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from functools import partial

from multiway import config, recipes
from multiway.errors import ConfigError

QUESTIONS = ("vqa", "nlvr2", "entailment", "text_classification")
"""Tasks whose data are examples with answers."""


def quickstart(given: argparse.Namespace) -> None:
    """Everything once, on embedded data."""
    from multiway.quickstart import run

    run(given.out, given.seed, given.steps)


def list_recipes(given: argparse.Namespace) -> None:
    """Recipes with their first sentence, then models."""
    found = [(name, text) for name, text in recipes.names() if fnmatch.fnmatch(name, given.pattern)]
    from multiway.pretrained import list_models

    models = list_models(given.pattern)
    if not found and not models:
        known = [name for name, _ in recipes.names()]
        raise ConfigError(f"nothing is named {given.pattern!r}{config.nearest(given.pattern, known)}")
    width = max(len(name) for name in [*models, *(name for name, _ in found)])
    for name, text in found:
        print(f"{name:{width}} {text}")
    for name in models:
        print(f"{name:{width}} model")


def show(given: argparse.Namespace) -> None:
    """The resolved run as options of ``train``."""
    run, _ = recipes.recipe(given.recipe)
    for name, value in config.flatten(config.override(run, given.settings)):
        print(f"--{name} {json.dumps(value)}")


def train(given: argparse.Namespace) -> None:
    """Train or resume."""
    if (given.recipe is None) == (given.config is None):
        raise ConfigError("train takes either a recipe or --config FILE; see multiway list")
    saved = config.read(given.config) if given.config else {"recipe": given.recipe}
    run, module = recipes.recipe(saved["recipe"])
    run = config.apply(run, saved)
    extra = [f"--schedule.steps={given.steps}"] if given.steps is not None else []
    run = config.override(run, [*given.settings, *extra])
    from multiway.engine.train import train as loop

    page = None
    if given.profile:
        from multiway.report.profile import write as page
    change = tuple(name for name in given.change.split(",") if name)
    figures = loop(
        run, partial(module.build, out=given.out), given.out, resume=given.resume == "auto", change=change,
        profile=page,
    )  # fmt: skip
    if figures:
        print(json.dumps(figures))


def plan(given: argparse.Namespace) -> None:
    """What a run will take, as tables or JSON."""
    run, module = recipes.recipe(given.recipe)
    run = config.override(run, given.settings)
    from multiway.estimate import estimate, show

    tokens = {"pair": given.tokens[0], "text": given.tokens[-1]} if given.tokens else {}
    report = estimate(
        run, module.assemble, hardware=given.hardware, devices=given.devices,
        memory=given.memory and given.memory * 1e9, tokens=tokens,
    )  # fmt: skip
    if given.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


def evaluate(given: argparse.Namespace) -> None:
    """Figures of one task as JSON."""
    if given.task in QUESTIONS:
        from multiway.answers import evaluate as work

        print(
            json.dumps(work(given.model, given.task, given.data, given.split, given.set, given.predictions), indent=2)
        )
        return
    from multiway.evaluation import evaluate_model
    from multiway.tasks.prompts import templates

    prompts = [*(given.prompt or ()), *(templates(given.prompts) if given.prompts else ())]
    figures = evaluate_model(
        given.model, given.task, given.data, given.split, prompts, given.unit, given.predictions,
        classes=given.classes, rerank=given.model if given.rerank == "" else given.rerank, top=given.top,
    )  # fmt: skip
    print(json.dumps(figures, indent=2))


def caption(given: argparse.Namespace) -> None:
    """A line per picture: its name, a tab, its caption."""
    from multiway import pretrained
    from multiway.evaluation import captions

    found = captions(pretrained.load(given.model), given.picture, beams=given.beams)
    for name, text in zip(given.picture, found, strict=True):
        print(f"{name}\t{text}")


def answer(given: argparse.Namespace) -> None:
    """The likeliest answers, a line each."""
    from multiway import pretrained
    from multiway.answers import VALUE
    from multiway.answers import answer as work

    model = pretrained.load(given.model)
    asked = given.text if given.second is None else (given.text, given.second)
    found = work(model, [asked], [given.picture])[0]
    labels = model.preprocessor.labels
    if labels == [VALUE]:
        print(f"{float(found):.3f}")
        return
    values, places = found.topk(min(max(1, given.k), len(labels)))
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        print(f"{value:6.1%}  {labels[place]}")


def classify(given: argparse.Namespace) -> None:
    """The likeliest names of each picture, as a table."""
    from rich.console import Console
    from rich.table import Table

    from multiway import pretrained
    from multiway.evaluation import classify as work
    from multiway.tasks.prompts import BARE, templates

    if given.k < 1 or (given.prompts and not given.classes):
        raise ConfigError("classify prints -k 1 or more names, and --prompts describe those in --classes A,B,...")
    classes = [name.strip() for name in given.classes.split(",") if name.strip()] if given.classes else []
    prompts = templates(given.prompts) if given.prompts else (BARE,)
    names, found = work(pretrained.load(given.model), given.picture, classes, prompts)
    table = Table("picture", "class", "probability")
    for picture, own in zip(given.picture, found, strict=True):
        values, places = own.topk(min(given.k, len(names)))
        for n, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            table.add_row("" if n else picture, names[place], f"{value:.1%}", end_section=n + 1 == len(values))
    Console().print(table)


def convert(given: argparse.Namespace) -> None:
    """A model folder and its receipt."""
    from multiway.convert import convert as work

    receipt = work(
        given.source, given.out, name=given.model, layout=given.layout, image_px=given.image_px,
        tokenizer=given.tokenizer,
    )  # fmt: skip
    receipt.show()


def embed(given: argparse.Namespace) -> None:
    """Vectors of a folder, file or index."""
    from multiway.search.embed import embed as work

    work(given.source, given.model, given.out)


def search(given: argparse.Namespace) -> None:
    """The nearest records of a store."""
    from multiway.search.query import search as work

    for hit in work(given.store, given.query, k=given.k, model=given.model):
        print(hit)


def data_index(given: argparse.Namespace) -> None:
    """Make an index and describe it."""
    from multiway.data.index import build
    from multiway.data.text import TextTokenizer

    tokenizer = TextTokenizer.load(given.tokenizer) if given.tokenizer else None
    index = build(
        given.root, given.out, split=given.split, tokenizer=tokenizer, vocab=given.vocab, window=given.window,
        missing=given.missing, max_bad_fraction=given.max_bad, workers=given.workers, task=given.task,
    )  # fmt: skip
    _table(index)


def data_check(given: argparse.Namespace) -> None:
    """The report of a pass over raw data, and every fault on stderr."""
    from multiway.data.index import check

    report = check(given.root, split=given.split, missing=given.missing, task=given.task)
    for fault in report.faults:
        print(fault, file=sys.stderr)
    print(json.dumps(report.as_dict(), indent=2))


def data_list(given: argparse.Namespace) -> None:
    """A row per source of an index."""
    from multiway.data.index import Index

    _table(Index.open(given.index))


def diagnose_hiding(given: argparse.Namespace) -> None:
    """AvgDist; prints the page's path, as the other diagnoses do."""
    from multiway.diagnose.hiding import run
    from multiway.recipes.pictures import Hiding

    hiding = Hiding(scheme=given.scheme, ratio=given.ratio, cell=given.cell)
    print(run(given.out, hiding=hiding, px=given.px, patch=given.patch, draws=given.draws, seed=given.seed))


def diagnose_attention(given: argparse.Namespace) -> None:
    """What heads look at."""
    from multiway.diagnose.attention import run

    print(run(given.out, given.model, data=given.data, split=given.split, count=given.count))


def diagnose_features(given: argparse.Namespace) -> None:
    """What blocks make of pictures."""
    from multiway.diagnose.features import run

    print(run(given.out, given.model, data=given.data, split=given.split, count=given.count))


def diagnose_reconstruct(given: argparse.Namespace) -> None:
    """Hidden pixels, filled in."""
    from multiway.diagnose.reconstruct import parse_box, run

    own = {name: value for name in ("scheme", "ratio", "cell") if (value := getattr(given, name)) is not None}
    boxes = [parse_box(text) for text in given.box]
    print(
        run(
            given.out, given.model, data=given.data, split=given.split, boxes=boxes, given=own, count=given.count,
            seed=given.seed,
        )
    )  # fmt: skip


def diagnose_scaling(given: argparse.Namespace) -> None:
    """Laws of scale."""
    from multiway.diagnose.scaling import run

    print(run(given.out, given.run, published=given.published))


def _table(index) -> None:  # noqa: ANN001 - data is imported late, it needs torch
    from rich.console import Console
    from rich.table import Table

    from multiway.data.index import describe

    rows = describe(index)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console().print(table)
