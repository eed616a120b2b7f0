"""What the recipes of pairs share, perhaps with texts alone: their settings, and how a run becomes a job. No recipe is
named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multiway import evaluation, pretrained
from multiway.backbones.vit import whole_patches
from multiway.data.augment import PAIRED
from multiway.data.collate import DualCollate, Samples, Words
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import FITTING, Corpus, Load, Source, open_corpus, scene_corpus, splits
from multiway.engine.train import Job
from multiway.errors import ConfigError
from multiway.objectives.contrastive import Negatives
from multiway.preprocessor import Preprocessor, longest_text
from multiway.pretrained import Pretrained
from multiway.recipes import questions
from multiway.recipes.pictures import TokenizerOf, export_of, give_tokens
from multiway.run import Run
from multiway.types import Batch, Objective

Assemble = Callable[[Run, Words], tuple[Objective, Callable[[Samples], Batch]]]
"""A recipe module's ``assemble``."""

Measure = Callable[[Pretrained, Objective, Any], dict[str, Any]]
"""Figures of a model by what is trained, whose objective and collate these are."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Match pictures and texts. ``keep``: share of the patches of each picture that are read while training, ViTs only:
    fewer make shorter steps, and a short tuning with all of them recovers most (FLIP, arXiv 2212.00794);
    ``negatives``: whom a pair is compared with, see `multiway.objectives.contrastive.Negatives`; ``augment``: whether
    pictures are changed by RandAugment, too (masked.md 6.4)."""

    keep: float = 1.0
    negatives: Negatives = "gathered"
    augment: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"objective.keep is a share of the patches, above 0 and at most 1, got {self.keep}")


def collate(run: Run, words: Words, model: Any) -> DualCollate:
    """What makes the batches of a run."""
    grid = whole_patches(run.model.image_px, run.model.patch)
    branches = 2 * model.layers if run.model.drop_path else 0
    return DualCollate(words=words, grid=grid, branches=branches, keep=run.objective.keep, causal=model.causal)


def build(
    run: Run,
    out: Path,
    assemble: Assemble,
    tokenizer_of: TokenizerOf | None = None,
    measure: Measure | None = None,
) -> Job:
    """Everything the loop needs for pairs, texts or pictures; what is made once (index, image tokenizer, stored views)
    is kept below ``out``.

    ``tokenizer_of``: makes the image tokenizer of objectives that predict tokens, as `pictures.tokenizer_of`;
    ``measure``: what evaluation tells, None = `figures`.
    """
    data = run.data
    if run.init and not data.tokenizer:
        data = dataclasses.replace(data, tokenizer=str(Path(run.init) / pretrained.TOKENIZER))
    corpus = scene_corpus(run.seed) if data.root is None else open_corpus(data, out / "index")
    tokenizer = corpus.tokenizer
    kinds = fitting(run, corpus)
    views = {"image": view_of(run, data.image_scale), "pair": view_of(run, data.pair_scale)}
    views = {kind: view for kind, view in views.items() if kind in kinds}
    torch.manual_seed(run.seed)
    objective, made = assemble(run, corpus.words(data))
    model: Any = objective.model
    objective.init_weights()
    if run.init:
        questions.start_from(model, run.init)
    streams = [
        Stream(kind=kind, sources=corpus.sources[kind], weights=corpus.weights[kind], items=count, seed=run.seed)
        for kind, count in kinds.items()
    ]
    stored, digest = {}, ""
    if tokenizer_of is not None and views:
        stored, digest = give_tokens(run, corpus, views, objective, tokenizer_of, out)
    load = Load(
        corpus=corpus, views=views, seed=run.seed, decoder=data.decoder, stored=stored,
        mismatch=getattr(run.objective, "mismatch", 0.0),
    )  # fmt: skip
    shares = {kind: share for kind, share in getattr(run.objective, "shares", {}).items() if kind in kinds}
    preprocessor = Preprocessor.of(run.model, tokenizer, {"text_tokens": data.text_tokens})

    def evaluate(model: nn.Module) -> dict[str, Any]:
        ready = Pretrained(model, tokenizer, preprocessor)
        return measure(ready, objective, made) if measure else figures(ready, run, out)

    return Job(
        objective=objective, batches=Batches(streams, load, made, shares or None), data_hash=corpus.hash + digest,
        export=export_of(run, objective, preprocessor, tokenizer), evaluate=evaluate,
    )  # fmt: skip


def fitting(run: Run, corpus: Corpus) -> dict[str, int]:
    """Samples of a step by kind; raises ConfigError for data without one of the kinds, or too much for the model."""
    data, tokenizer = run.data, corpus.tokenizer
    items = {"image": data.images, "pair": data.pairs, "text": data.texts}
    kinds = {kind: count for kind, count in items.items() if count}
    if not kinds:
        raise ConfigError("a step takes nothing: set data.pairs, data.images or data.texts above 0")
    for kind, count in kinds.items():
        if not corpus.sources[kind]:
            raise ConfigError(
                f"{data.root} does not fit {run.recipe}, a step of which takes {count} {FITTING[kind]}: it has none; "
                f"give some, or where others are learned from as well set data.{kind}s to 0"
            )
    vocab, most = 0 if tokenizer is None else tokenizer.vocab, longest_text(run.model)
    longest = max(data.window if kind == "text" else data.text_tokens for kind in kinds)
    if vocab > run.model.vocab or longest > most:
        raise ConfigError(
            f"tokenizer and texts have {vocab} ids and up to {longest} tokens, the model {run.model.vocab} and {most}: "
            "set model.vocab or data.vocab, data.text_tokens and data.window"
        )
    return kinds


def view_of(run: Run, least: float) -> View:
    """How pictures are shown while training; ``least``: smallest share of a picture's area that a crop keeps."""
    data, scale = run.data, None if least == 1 else (least, 1.0)
    plain = scale is not None or getattr(run.objective, "views", 0)  # stored views are crops, or the whole picture
    return View(
        px=run.model.image_px, scale=scale, share=None if plain else getattr(run.model, "share", None),
        interpolation=data.interpolation, flip=data.flip / 2, jitter=data.jitter,
        augment=PAIRED if getattr(run.objective, "augment", False) else None,
    )  # fmt: skip


def figures(ready: Pretrained, run: Run, out: Path) -> dict[str, Any]:
    """Retrieval and zero-shot classification of embedded scenes, or retrieval of what is held out; of a model that
    compares pairs.
    """
    if not run.data.pairs:
        return {}
    if run.data.root is None:
        return {
            "retrieval": evaluation.retrieval_of_scenes(ready, run.seed),
            "zero_shot": evaluation.zero_shot_of_scenes(ready, run.seed),
        }
    sources = held_out(run, out)
    return {} if sources is None else {"retrieval": evaluation.retrieval_of(ready, sources, evaluation.HELD_OUT)}


def held_out(run: Run, out: Path) -> Sequence[Source] | None:
    """The pairs of the root's split ``val``, None without one."""
    if run.data.root is None or "val" not in splits(run.data.root):
        return None
    val = open_corpus(dataclasses.replace(run.data, more={}, tokenizer=None), out / "index", split="val")
    return val.sources["pair"]
