"""The command line: every command and its options. What they do is in `multiway.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from multiway import commands
from multiway.engine.heap import keep_freed_memory
from multiway.errors import ConfigError, MultiwayError

WITH_SETTINGS = ("train", "show", "plan")
"""Commands that take every setting of a run as an option."""

PROMPTS = "templates: photos, symbols, satellite, digits, textures, or a file with one a line, {} for the name"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit codes are those of `multiway.errors`."""
    keep_freed_memory()
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
    every = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, call, text: str) -> argparse.ArgumentParser:  # noqa: ANN001
        own = every.add_parser(name, help=text, description=text)
        own.set_defaults(call=call)
        return own

    own = command("quickstart", commands.quickstart, "train a small BEiT-3 on embedded data, and write a report")
    own.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--steps", type=int, help="fewer or more steps than the recipe's")

    own = command("list", commands.list_recipes, "list recipes and models")
    own.add_argument("pattern", nargs="?", default="*")

    own = command("show", commands.show, "print the settings of a recipe, with overrides applied")
    own.add_argument("recipe")

    own = command("train", commands.train, "train or resume a recipe; every setting of `multiway show` is an option")
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

    own = command("plan", commands.plan, "what a recipe will take: parameters, FLOPs, memory, the largest batch, time")
    own.add_argument("recipe")
    own.add_argument("--hardware", default="here", help="a100, h100, ...; default: this machine, measured")
    own.add_argument("--devices", type=int, default=1)
    own.add_argument("--memory", type=float, metavar="GB", help="of a device; default: the hardware's")
    own.add_argument(
        "--tokens", type=int, nargs="+", metavar="N",
        help="mean length of texts, or of those of pairs and of texts alone; default: the longest that are allowed",
    )  # fmt: skip
    own.add_argument("--json", action="store_true", help="print JSON")

    own = command("evaluate", commands.evaluate, "measure a model on a task")
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument(
        "--task",
        required=True,
        choices=("retrieval", "captioning", "zero_shot", "image_classification", "linear_probe", *commands.QUESTIONS),
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

    own = command(
        "answer", commands.answer, "answer a question about pictures, or classify texts, with a model tuned to it"
    )
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument("text")
    own.add_argument("picture", nargs="*", help="as many as the model reads with every text")
    own.add_argument("--second", metavar="TEXT", help="a second text, where the model was tuned to pairs of them")
    own.add_argument("-k", type=int, default=5, help="how many answers are printed")

    own = command("caption", commands.caption, "say what is in pictures")
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument("picture", nargs="+")
    own.add_argument("--beams", type=int, default=3)

    own = command("classify", commands.classify, "name pictures: by a model's own classes, or by any that you say")
    own.add_argument("model", help="a model folder, a run folder, or a hub id")
    own.add_argument("picture", nargs="+")
    own.add_argument("--classes", metavar="A,B,...", help="any names, for models that compare pictures and texts")
    own.add_argument("--prompts", metavar="SET|FILE", help=PROMPTS)
    own.add_argument("-k", type=int, default=5, help="how many names of each picture are printed")

    own = command("convert", commands.convert, "turn published weights into a model folder, with a receipt")
    own.add_argument("source", help="a file (safetensors, .npz, .pth, TorchScript), a folder with one, or a hub id")
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--model", help="which of `multiway list` it is; default: the one that explains every weight")
    own.add_argument("--layout", help="whose names the weights have; default: the one that explains every weight")
    own.add_argument("--image-px", type=int, metavar="N", help="read pictures of N x N pixels from now on")
    own.add_argument("--tokenizer", metavar="FILE", help="the model's, such as beit3.spm; default: beside the weights")

    own = command("embed", commands.embed, "turn pictures and texts into vectors; started again, it continues")
    own.add_argument("source")
    own.add_argument("--model", required=True)
    own.add_argument("--out", type=Path, required=True)

    own = command("search", commands.search, "find the pictures and texts nearest to words or to a picture")
    own.add_argument("query", help="words, or the path of a picture")
    own.add_argument("--store", type=Path, default=Path("runs/quickstart/store"))
    own.add_argument("--model", help="default: the model the store was made with")
    own.add_argument("-k", type=int, default=5)

    data = every.add_parser("data", help="index, check and describe data", description="index, check and describe data")
    kinds = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    own = kinds.add_parser("index", help="read every record once and write an index", description="make an index")
    own.add_argument("root")
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--split")
    own.add_argument("--task", choices=commands.QUESTIONS, help="the records are examples of a task, with answers")
    own.add_argument("--tokenizer", help="a tokenizer.json; default: one trained on the texts")
    own.add_argument("--vocab", type=int, default=8192)
    own.add_argument("--window", type=int, default=512)
    own.add_argument("--workers", type=int, default=0)
    own.add_argument("--max-bad", type=float, default=0.01)
    own.add_argument("--missing", choices=("count", "skip"), default="count")
    own.set_defaults(call=commands.data_index)
    own = kinds.add_parser("check", help="read every record once, write nothing", description="check raw data")
    own.add_argument("root")
    own.add_argument("--split")
    own.add_argument("--task", choices=commands.QUESTIONS, help="the records are examples of a task, with answers")
    own.add_argument("--missing", choices=("count", "skip"), default="count")
    own.set_defaults(call=commands.data_check)
    own = kinds.add_parser("list", help="describe an index", description="describe an index")
    own.add_argument("index")
    own.set_defaults(call=commands.data_list)
    _add_diagnose(every)
    return parser


def _add_diagnose(every) -> None:  # noqa: ANN001
    """The five diagnoses and their options."""
    text = "look into models, hiding and runs: plots and a page"
    kinds = every.add_parser("diagnose", help=text, description=text).add_subparsers(
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

    own = command("hiding", commands.diagnose_hiding, "AvgDist of a masking strategy beside the published ones")
    own.add_argument("--px", type=int, default=192, help="side of pictures while pre-training")
    own.add_argument("--patch", type=int, default=16)
    own.add_argument("--draws", type=int, default=200, help="patterns per strategy")
    hiding(own, "cells", 0.6, 32)

    models = "one or two: model folders, run folders, hub ids, or names of models with random weights"
    own = command(
        "attention", commands.diagnose_attention, "how far and how evenly heads look, and how much they differ"
    )
    own.add_argument("model", nargs="+", help=models)
    pictures(own, 64)
    own = command("features", commands.diagnose_features, "which layers are alike, and how far activations spread")
    own.add_argument("model", nargs="+", help=models)
    pictures(own, 128)

    own = command(
        "reconstruct", commands.diagnose_reconstruct, "what a model that predicts pixels makes of hidden ones"
    )
    own.add_argument("model")
    pictures(own, 6)
    own.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1", help="of a thing; may be repeated")
    hiding(own, None, None, None)

    own = command("scaling", commands.diagnose_scaling, "loss against compute, data and parameters, and its power law")
    own.add_argument("run", nargs="*", type=Path, help="run folders")
    own.add_argument("--published", action="store_true", help="also the 63 points of SimMIM's authors")
