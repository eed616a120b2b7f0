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
        "--task", required=True, choices=("retrieval", "zero_shot", "image_classification", "linear_probe")
    )
    own.add_argument("--data", help="pictures with captions (retrieval) or in folders by class; none = embedded scenes")
    own.add_argument("--split", help="which split of the data")
    own.add_argument(
        "--prompt", action="append", help="zero_shot: a template such as 'a photo of a {}'; may be repeated"
    )

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
    own.add_argument("--missing", choices=("count", "skip"), default="count")
    own.set_defaults(call=data_check)
    own = kinds.add_parser("list", help="describe an index", description="describe an index")
    own.add_argument("index")
    own.set_defaults(call=data_list)
    return parser


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
    for name, text in found:
        print(f"{name:24} {text}")
    for name in models:
        print(f"{name:32} model")


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
    from multiway.evaluation import evaluate_model

    print(json.dumps(evaluate_model(given.model, given.task, given.data, given.split, given.prompt), indent=2))


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
        missing=given.missing, max_bad_fraction=given.max_bad, workers=given.workers,
    )  # fmt: skip
    _table(index)


def data_check(given: argparse.Namespace) -> None:
    """The report of a pass over raw data."""
    from multiway.data.index import check

    print(json.dumps(check(given.root, split=given.split, missing=given.missing).as_dict(), indent=2))


def data_list(given: argparse.Namespace) -> None:
    """A row per source of an index."""
    from multiway.data.index import Index

    _table(Index.open(given.index))


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
