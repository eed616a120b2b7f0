"""The command line: parse, call, print. Every command is one function of the library."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from multiway import config, recipes
from multiway.errors import ConfigError, MultiwayError

WITH_SETTINGS = ("train", "show", "plan")
"""Commands that take every setting of a run as an option."""

QUESTIONS = ("vqa", "nlvr2", "entailment", "text_classification")
"""Tasks whose data are examples with answers."""

PROMPTS = "templates: photos, symbols, satellite, digits, textures, or a file with one a line, {} for the name"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit codes are those of `multiway.errors`."""
    parser = build_parser()
    given, rest = parser.parse_known_args(arguments)
    if rest and given.command not in WITH_SETTINGS:
        raise SystemExit(_fail(ConfigError(f"unknown argument {rest[0]!r}; see multiway {given.command} --help")))
    try:
        if given.command in WITH_SETTINGS:
            given.settings = rest
        given.call(given)
    except MultiwayError as error:
        raise SystemExit(_fail(error)) from None


def _fail(error: MultiwayError) -> int:
    print(f"multiway: {error}", file=sys.stderr)
    return error.exit_code


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="multiway", description="Multimodal foundation models, small and fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, call, text: str) -> argparse.ArgumentParser:  # noqa: ANN001
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(call=call)
        return own

    own = command("quickstart", quickstart, "train a small BEiT-3 on embedded data, and write a report")
    own.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--steps", type=int, help="fewer or more steps than the recipe's")

    own = command("list", list_recipes, "list recipes and models")
    own.add_argument("pattern", nargs="?", default="*")

    own = command("show", show, "print the settings of a recipe, with overrides applied")
    own.add_argument("recipe")

    own = command("train", train, "train or resume a recipe; every setting of `multiway show` is an option")
    own.add_argument("recipe", nargs="?")
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--config", type=Path, help="settings of an earlier run, its run.json, instead of a recipe")
    own.add_argument("--steps", type=int, help="short for --schedule.steps")
    own.add_argument("--resume", choices=("auto", "no"), default="auto")
    own.add_argument(
        "--change", default="", help="settings that may differ from the run being resumed, comma-separated"
    )
    own.add_argument(
        "--profile", action="store_true", help="record a few steps: a trace, and a page of where their time goes"
    )

    own = command("plan", plan, "what a recipe will take: parameters, FLOPs, memory, the largest batch, time")
    own.add_argument("recipe")
    own.add_argument("--hardware", default="here", help="a100, h100, ...; default: this machine, measured")
    own.add_argument("--devices", type=int, default=1)
    own.add_argument("--memory", type=float, metavar="GB", help="of a device; default: the hardware's")
    own.add_argument(
        "--tokens", type=int, nargs="+", metavar="N",
        help="mean length of texts, or of those of pairs and of texts alone; default: the longest that are allowed",
    )  # fmt: skip
    own.add_argument("--json", action="store_true", help="print JSON")

    own = command("evaluate", evaluate, "measure a model on a task")
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument(
        "--task",
        required=True,
        choices=("retrieval", "captioning", "zero_shot", "image_classification", "linear_probe", *QUESTIONS),
    )
    own.add_argument(
        "--data",
        help="pictures with captions (retrieval, captioning), in folders by class, or examples with answers; "
        "none = embedded scenes",
    )
    own.add_argument("--split", help="which split of the data")
    own.add_argument(
        "--prompt", action="append", help="zero_shot: a template such as 'a photo of a {}'; may be repeated"
    )
    own.add_argument("--prompts", metavar="SET|FILE", help=f"zero_shot: {PROMPTS}")
    own.add_argument(
        "--classes", metavar="FILE", help="zero_shot: names of classes, JSON {folder: name} or a line each in order"
    )
    own.add_argument(
        "--rerank", nargs="?", const="", metavar="MODEL",
        help="retrieval: a model that reads picture and text together orders the nearest anew; default: the same model",
    )  # fmt: skip
    own.add_argument("--top", type=int, default=32, help="retrieval: how many of the nearest are re-ranked")
    own.add_argument(
        "--unit", choices=("words", "characters"), default="words", help="captioning: characters for Chinese"
    )
    own.add_argument("--set", metavar="NAME", default="", help="text_classification: the set of GLUE that the data are")
    own.add_argument(
        "--predictions", metavar="FILE", help="write captions or answers as the official scorer reads them"
    )

    own = command("answer", answer, "answer a question about pictures, or classify texts, with a model tuned to it")
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument("text")
    own.add_argument("picture", nargs="*", help="as many as the model reads with every text")
    own.add_argument("--second", metavar="TEXT", help="a second text, where the model was tuned to pairs of them")
    own.add_argument("-k", type=int, default=5, help="how many answers are printed")

    own = command("caption", caption, "say what is in pictures")
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument("picture", nargs="+")
    own.add_argument("--beams", type=int, default=3)

    own = command("classify", classify, "name pictures: by a model's own classes, or by any that you say")
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument("picture", nargs="+")
    own.add_argument("--classes", metavar="A,B,...", help="any names, for models that compare pictures and texts")
    own.add_argument("--prompts", metavar="SET|FILE", help=PROMPTS)
    own.add_argument("-k", type=int, default=5, help="how many names of each picture are printed")

    own = command("convert", convert, "turn published weights into a model folder, with a receipt")
    own.add_argument("source", help="a file (safetensors, .npz, .pth, TorchScript), a folder with one, or a hub id")
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--model", help="which of `multiway list` it is; default: the one that explains every weight")
    own.add_argument("--layout", help="whose names the weights have; default: the one that explains every weight")
    own.add_argument("--image-px", type=int, metavar="N", help="read pictures of N x N pixels from now on")
    own.add_argument("--tokenizer", metavar="FILE", help="the model's, such as beit3.spm; default: beside the weights")

    own = command("embed", embed, "turn pictures and texts into vectors; started again, it continues")
    own.add_argument("source")
    own.add_argument("--model", required=True)
    own.add_argument("--out", type=Path, required=True)

    own = command("search", search, "find the pictures and texts nearest to words or to a picture")
    own.add_argument("query", help="words, or the path of a picture")
    own.add_argument("--store", type=Path, default=Path("runs/quickstart/store"))
    own.add_argument("--model", help="default: the model the store was made with")
    own.add_argument("-k", type=int, default=5)

    data = commands.add_parser(
        "data", help="index, check and describe data", description="index, check and describe data"
    )
    kinds = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    own = kinds.add_parser("index", help="read every record once and write an index", description="make an index")
    own.add_argument("root")
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--split")
    own.add_argument("--task", choices=QUESTIONS, help="the records are examples of a task, with answers")
    own.add_argument("--tokenizer", help="a tokenizer.json; default: one trained on the texts")
    own.add_argument("--vocab", type=int, default=8192)
    own.add_argument("--window", type=int, default=512)
    own.add_argument("--workers", type=int, default=0)
    own.add_argument("--max-bad", type=float, default=0.01)
    own.add_argument("--missing", choices=("count", "skip"), default="count")
    own.set_defaults(call=data_index)
    own = kinds.add_parser("check", help="read every record once, write nothing", description="check raw data")
    own.add_argument("root")
    own.add_argument("--split")
    own.add_argument("--task", choices=QUESTIONS, help="the records are examples of a task, with answers")
    own.add_argument("--missing", choices=("count", "skip"), default="count")
    own.set_defaults(call=data_check)
    own = kinds.add_parser("list", help="describe an index", description="describe an index")
    own.add_argument("index")
    own.set_defaults(call=data_list)
    _add_diagnose(commands)
    return parser


def _add_diagnose(commands) -> None:  # noqa: ANN001
    """The five diagnoses and their options."""
    text = "look into models, hiding and runs: plots and a page"
    kinds = commands.add_parser("diagnose", help=text, description=text).add_subparsers(
        dest="diagnose_command", required=True, metavar="COMMAND"
    )

    def command(name: str, call, text: str) -> argparse.ArgumentParser:  # noqa: ANN001
        own = kinds.add_parser(name, help=text, description=text)
        own.add_argument("--out", type=Path, default=Path("runs/diagnose") / name)
        own.set_defaults(call=call)
        return own

    def pictures(own: argparse.ArgumentParser, count: int) -> None:
        own.add_argument("--data", help="a picture, a folder, file or index of them; none = embedded scenes")
        own.add_argument("--split", help="which split of the data")
        own.add_argument("--count", type=int, default=count, help="pictures at most, evenly spread over the data")

    def hiding(own: argparse.ArgumentParser, scheme: str | None, ratio: float | None, cell: int | None) -> None:
        schemes = ("patches", "cells", "blocks", "square", "central square")
        own.add_argument("--scheme", choices=schemes, default=scheme)
        own.add_argument("--ratio", type=float, default=ratio, help="share that is hidden")
        own.add_argument("--cell", type=int, default=cell, help="side of cells in pixels")
        own.add_argument("--seed", type=int, default=0)

    own = command("hiding", diagnose_hiding, "AvgDist of a masking strategy beside the published ones")
    own.add_argument("--px", type=int, default=192, help="side of pictures while pre-training")
    own.add_argument("--patch", type=int, default=16)
    own.add_argument("--draws", type=int, default=200, help="patterns per strategy")
    hiding(own, "cells", 0.6, 32)

    models = "one or two: model folders, run folders, hub ids, or names of models with random weights"
    own = command("attention", diagnose_attention, "how far and how evenly heads look, and how much they differ")
    own.add_argument("model", nargs="+", help=models)
    pictures(own, 64)
    own = command("features", diagnose_features, "which layers are alike, and how far activations spread")
    own.add_argument("model", nargs="+", help=models)
    pictures(own, 128)

    own = command("reconstruct", diagnose_reconstruct, "what a model that predicts pixels makes of hidden ones")
    own.add_argument("model")
    pictures(own, 6)
    own.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1", help="of a thing; may be repeated")
    hiding(own, None, None, None)

    own = command("scaling", diagnose_scaling, "loss against compute, data and parameters, and its power law")
    own.add_argument("run", nargs="*", type=Path, help="run folders")
    own.add_argument("--published", action="store_true", help="also the 63 points of SimMIM's authors")


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
    """The report of a pass over raw data."""
    from multiway.data.index import check

    report = check(given.root, split=given.split, missing=given.missing, task=given.task)
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
