"""What the recipes of pairs share, perhaps with texts alone: their settings, and how a run becomes a job. No recipe is
named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multiway import evaluation, pretrained
from multiway.backbones.vit import whole_patches
from multiway.data.augment import PAIRED
from multiway.data.collate import DualCollate, Samples, Words
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import FITTING, Load, open_corpus, scene_corpus, splits
from multiway.engine.log import CONSOLE
from multiway.engine.train import Job
from multiway.errors import ConfigError
from multiway.objectives.contrastive import Negatives
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained
from multiway.recipes.pictures import TokenizerOf, give_tokens
from multiway.run import Run
from multiway.types import Batch, Objective

Assemble = Callable[[Run, Words], tuple[Objective, Callable[[Samples], Batch]]]
"""A recipe module's ``assemble``."""


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
    start: Callable[[Any, str], None] | None = None,
    tokenizer_of: TokenizerOf | None = None,
) -> Job:
    """Everything the loop needs for pairs, texts or pictures; what is made once (index, stored views) is kept below
    ``out``.

    ``start(model, folder)``: fills a model with the weights of a folder, None = `start_from`; ``tokenizer_of``: makes
    the image tokenizer of objectives that predict tokens, as `pictures.tokenizer_of`.
    """
    data = run.data
    if run.init and not data.tokenizer:
        data = dataclasses.replace(data, tokenizer=str(Path(run.init) / pretrained.TOKENIZER))
    corpus = scene_corpus(run.seed) if data.root is None else open_corpus(data, out / "index")
    tokenizer = corpus.tokenizer
    items = {"image": data.images, "pair": data.pairs, "text": data.texts}
    kinds = {kind: count for kind, count in items.items() if count}
    lacking = [kind for kind in kinds if not corpus.sources[kind]]
    if tokenizer is None or lacking:
        what = FITTING[(lacking or ["text"])[0]]
        raise ConfigError(f"{data.root} does not fit {run.recipe}, which learns from {what}: it has none")
    longest = max(data.window if kind == "text" else data.text_tokens for kind in kinds)
    if tokenizer.vocab > run.model.vocab or longest > run.model.text_tokens:
        raise ConfigError(
            f"tokenizer and texts have {tokenizer.vocab} ids and up to {longest} tokens, the model {run.model.vocab} "
            f"and {run.model.text_tokens}: set model.vocab, data.text_tokens and data.window"
        )
    views = {"image": view_of(run, data.image_scale), "pair": view_of(run, data.pair_scale)}
    views = {kind: view for kind, view in views.items() if kind in kinds}
    torch.manual_seed(run.seed)
    objective, made = assemble(run, corpus.words(data))
    model: Any = objective.model
    objective.init_weights()
    if run.init:
        (start or start_from)(model, run.init)
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

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        text = f"Trained by `multiway train {run.recipe}` for {run.schedule.steps} steps."
        pretrained.save_pretrained(
            model, folder, tokenizer=tokenizer, preprocessor=dataclasses.asdict(preprocessor),
            card={"title": run.recipe, "text": text}, weights=weights,
        )  # fmt: skip

    def evaluate(model: nn.Module) -> dict[str, Any]:
        return figures(Pretrained(model, tokenizer, preprocessor), run, out)

    return Job(
        objective=objective, batches=Batches(streams, load, made, shares or None), data_hash=corpus.hash + digest,
        export=export, evaluate=evaluate,
    )  # fmt: skip


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
    """Retrieval and zero-shot classification of embedded scenes, or retrieval of the data's split ``val``; of a model
    that compares pairs.
    """
    if not run.data.pairs:
        return {}
    if run.data.root is None:
        return {
            "retrieval": evaluation.retrieval_of_scenes(ready, run.seed),
            "zero_shot": evaluation.zero_shot_of_scenes(ready, run.seed),
        }
    if "val" not in splits(run.data.root):
        return {}
    val = open_corpus(dataclasses.replace(run.data, more={}, tokenizer=None), out / "index", split="val")
    return {"retrieval": evaluation.retrieval_of(ready, val.sources["pair"], evaluation.HELD_OUT)}


def start_from(model: Any, folder: str) -> None:
    """Fill a model with the weights of a folder, positions interpolated to its pictures.

    Raises ConfigError when the folder holds another kind or shape of model.
    """
    source: Any = pretrained.load(folder).model
    if type(source) is not type(model):
        raise ConfigError(f"{folder} holds a {type(source).__name__}, this recipe tunes a {type(model).__name__}")
    source.set_image_size(model.config.image_px)
    given, own = source.state_dict(), model.state_dict()
    other = [name for name in own if name not in given or given[name].shape != own[name].shape]
    if other or given.keys() != own.keys():
        raise ConfigError(f"{folder} has another shape than this run's model: {', '.join(other[:5])}; set model.*")
    model.load_state_dict(given)
    CONSOLE.print(f"weights from {folder}")
