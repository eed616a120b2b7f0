"""What the recipes of pictures alone share: their settings, and how a run becomes a job. No recipe is named here."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multiway import pretrained
from multiway.backbones.dvae import DiscreteVAE
from multiway.backbones.vit import whole_patches
from multiway.data.augment import RandAugment
from multiway.data.collate import Sample, Samples, Words
from multiway.data.hide import hide_blocks, hide_cells, hide_patches, hide_square, smallest_block
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.order import generator
from multiway.data.pictures import LabelCollate, PictureCollate
from multiway.data.prepare import (
    Corpus,
    Load,
    digit_corpus,
    fit_patch_codebook,
    open_corpus,
    require_labels,
    splits,
    stored_views,
)
from multiway.data.text import TextTokenizer
from multiway.data.views import StoredViews
from multiway.engine.log import CONSOLE
from multiway.engine.train import Job
from multiway.errors import ConfigError, DataError
from multiway.nn.frozen import Frozen
from multiway.nn.quantize import ImageTokenizer, PatchCodebook
from multiway.preprocessor import Preprocessor
from multiway.published import located_weights
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.tasks import image_classification
from multiway.tasks.needs import check
from multiway.types import Batch, Objective, move
from multiway.weights.untrusted import read_published

Assemble = Callable[[Run, Words], tuple[Objective, Callable[[Samples], Batch]]]
"""A recipe module's ``assemble``; pictures alone need no words."""

TokenizerOf = Callable[[Run, Corpus, View, Path], tuple[ImageTokenizer, str]]
"""Makes the image tokenizer of a run, perhaps fitted on such views and kept in the folder, and its identity."""

IMAGE_TOKENIZER = "image_tokenizer.safetensors"
"""The file of a patch codebook beside a model's weights."""

HELD_OUT = 2000
"""Pictures of a validation split that are measured on at most."""
BATCH = 100
"""Of them at once."""


@dataclass(frozen=True, kw_only=True)
class Hiding:
    """Which patches are hidden.

    ``scheme``: single patches (MAE), square cells of ``cell`` pixels (SimMIM), blocks (BEiT), or one square; ``ratio``:
    share of the patches, for blocks and single ones the exact number; ``views``: of each picture whose visual tokens
    are stored before training, 0 = computed while training (objectives that predict tokens only).
    """

    scheme: Literal["patches", "cells", "blocks", "square", "central square"] = "patches"
    ratio: float = 0.75
    cell: int = 32
    views: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(f"objective.ratio is a share of the patches, between 0 and 1, got {self.ratio}")

    def of(self, grid: tuple[int, int], patch: int) -> Callable[[np.random.Generator], np.ndarray]:
        """The generator of hidden patches for a grid of patches of so many pixels."""
        patches = grid[0] * grid[1]
        if self.scheme == "cells":
            if self.cell % patch:
                raise ConfigError(f"objective.cell is {self.cell} pixels, expected a multiple of the patch, {patch}")
            return partial(hide_cells, grid, self.cell // patch, self.ratio)
        if self.scheme == "blocks":
            return partial(hide_blocks, grid, round(self.ratio * patches), smallest_block(patches))
        if self.scheme == "patches":
            return partial(hide_patches, grid, self.ratio)
        return partial(hide_square, grid, self.ratio, self.scheme == "central square")


@dataclass(frozen=True, kw_only=True)
class Codes(Hiding):
    """Hiding, for objectives that predict visual tokens. ``tokenizer``: folder of a VQ-KD, or file, folder or hub id of
    DALL-E's encoder (``facebook/flava-image-codebook``), None = mean patches, fitted by k-means before training."""

    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Learning what a teacher sees. ``teacher``: folder or hub id of any model of pictures."""

    teacher: str = ""


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Fine-tuning to classes. ``smoothing``: share of the probability spread over all classes; ``mixup``, ``cutmix``:
    parameters of their Beta distributions, 0 = off; ``erase``: probability of random erasing; ``augment``: whether
    RandAugment (2 operations, magnitude 9) is on (vision.md 2.3)."""

    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    erase: float = 0.25
    augment: bool = True


LIGHT = Classify(mixup=0.0, cutmix=0.0, erase=0.0, augment=False)
"""For few pictures and minutes: crops and mirroring alone."""


def classify(run: Run, model: Any) -> tuple[Objective, LabelCollate]:
    """Objective and collate of a run that tunes a model to classes."""
    settings: Classify = run.objective
    collate = LabelCollate(branches=branches(model), erase=settings.erase, mixup=settings.mixup, cutmix=settings.cutmix)
    return image_classification.ImageClassification(model, settings.smoothing), collate


def branches(model: Any) -> int:
    """Residual branches that stochastic depth may drop: two per block, none at rate 0."""
    return 2 * model.layers if model.config.drop_path else 0


def teacher_of(run: Run) -> nn.Module:
    """The teacher a run names, reading pictures of the run's size; raises ConfigError when it names none."""
    if not run.objective.teacher:
        raise ConfigError("this recipe learns from a teacher: set objective.teacher to a model's folder or hub id")
    teacher: Any = pretrained.load(run.objective.teacher).model
    check(teacher, image_classification.NEEDS, "a teacher of pictures")
    teacher.set_image_size(run.model.image_px)
    return teacher


def tokenizer_of(run: Run, corpus: Corpus, view: View, out: Path) -> tuple[ImageTokenizer, str]:
    """The image tokenizer a run names, and what identifies it; mean patches are fitted once and kept in ``out``.

    Raises ConfigError for a model that is none, ConversionError for a published file that is not DALL-E's encoder.
    """
    if run.objective.tokenizer is None:
        book = make_codebook(run, corpus, view, out)
        return book, hashlib.sha256(book.centroids.numpy().tobytes()).hexdigest()
    path = located_weights(run.objective.tokenizer)
    if path.is_file() or not pretrained.is_ours(path):
        return discrete_vae(run, read_published(path).state)
    found = pretrained.load(run.objective.tokenizer)
    model: Any = found.model
    if not callable(getattr(model, "decode", None)) or getattr(model, "codes", 0) != run.model.codes:
        raise ConfigError(
            f"{run.objective.tokenizer} is no image tokenizer of {run.model.codes} codes (model.codes): give the "
            "folder of a VQ-KD or of DALL-E's encoder, and set model.codes to the size of its codebook"
        )
    model.set_image_size(run.model.image_px)
    if grid_of(model.config) != grid_of(run.model):
        raise ConfigError(
            f"{run.objective.tokenizer} has {model.config.patch}-pixel patches, this run's model has "
            f"{run.model.patch}-pixel ones: every patch needs a visual token; set model.patch to the former"
        )
    return Frozen(model), found.fingerprint  # type: ignore[return-value]


def discrete_vae(run: Run, state: Mapping[str, Tensor]) -> tuple[ImageTokenizer, str]:
    """DALL-E's encoder with published weights, for pictures of the run, and what identifies it."""
    width = next((len(tensor) for name, tensor in state.items() if name.startswith("blocks.input.")), 0)
    model = DiscreteVAE(run.model.patch, run.model.codes, *([width] if width else []))
    model.load_published(state)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return Frozen(model), digest.hexdigest()  # type: ignore[return-value]


def give_tokens(
    run: Run,
    corpus: Corpus,
    views: Mapping[str, View],
    objective: Any,
    tokenizer: TokenizerOf,
    out: Path,
) -> tuple[dict[str, list[StoredViews | None]], str]:
    """Give an objective the image tokenizer it asks; the views of each kind whose tokens are stored, and a hash of all.

    The first of the views is what a tokenizer is fitted on.
    """
    objective.tokenizer, identity = tokenizer(run, corpus, next(iter(views.values())), out)
    if not run.objective.views:
        return {}, identity
    stored, views_hash = stored_views(
        corpus, objective.tokenizer, identity, views, each=run.objective.views, seed=run.seed, out=out,
        track=partial(track, description="visual tokens", console=CONSOLE),
    )  # fmt: skip
    return stored, identity + views_hash


def make_codebook(run: Run, corpus: Corpus, view: View, out: Path) -> PatchCodebook:
    """The image tokenizer of mean patches, fitted once and kept in ``out/codebook.safetensors``."""
    book = PatchCodebook(run.model.codes, run.model.patch)
    path = out / "codebook.safetensors"
    if path.is_file():
        book.load_state_dict(load_file(path))
        return book
    CONSOLE.print(f"fitting {run.model.codes} visual tokens on patches")
    plain = dataclasses.replace(view, jitter=0.0)
    centroids = fit_patch_codebook(corpus.sources["image"], run.model.codes, run.model.patch, plain, run.seed)
    book.load_centroids(centroids)
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(book.state_dict()), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return book


def with_classes(shape: Any) -> Any:
    """The config with at least one class, for a rehearsal without data."""
    return dataclasses.replace(shape, classes=shape.classes or 1)


def build(
    run: Run,
    out: Path,
    assemble: Assemble,
    tokenizer: TokenizerOf | None = None,
) -> Job:
    """Everything the loop needs for pictures alone; what is made once (index, stored views) is kept below ``out``.

    ``tokenizer``: makes the image tokenizer of objectives that predict tokens, and its identity.
    """
    data = run.data
    tuning = isinstance(run.objective, Classify)
    corpus = digit_corpus(run.seed) if data.root is None else open_pictures(data, out / "index")
    if tuning:
        require_labels(corpus)
        run = dataclasses.replace(run, model=named_classes(run.model, corpus))
    if not corpus.sources["image"]:
        raise ConfigError(f"{data.root} has no pictures")
    view = training_view(run)
    torch.manual_seed(run.seed)
    objective, collate = assemble(run, no_words())
    model: Any = objective.model
    objective.init_weights()
    if run.init:
        start_from(model, run.init)
    stored: Mapping[str, Sequence[StoredViews | None]] = {}
    data_hash = corpus.hash
    if isinstance(run.objective, Distil):
        data_hash += pretrained.load(run.objective.teacher).fingerprint
    elif tokenizer is not None:
        stored, digest = give_tokens(run, corpus, {"image": view}, objective, tokenizer, out)
        data_hash += digest
    stream = Stream(
        kind="image", sources=corpus.sources["image"], weights=corpus.weights["image"], items=data.images, seed=run.seed
    )
    load = Load(corpus=corpus, views={"image": view}, seed=run.seed, stored=stored, decoder=data.decoder)
    preprocessor = Preprocessor.of(run.model, None, {"labels": list(corpus.labels)} if tuning else {})
    held_out = val_corpus(run, out)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        if held_out is None:
            return {}
        shown = evaluation_view(run)
        if tuning:
            batches = labelled(held_out, shown, corpus.labels)
            return {"image_classification": image_classification.evaluate(model, batches)}
        return {"pre-training": held_out_loss(objective, collate, held_out, shown, run.seed)}

    return Job(
        objective=objective, batches=Batches([stream], load, collate), data_hash=data_hash,
        export=export_of(run, objective, preprocessor), evaluate=evaluate,
    )  # fmt: skip


def export_of(
    run: Run, objective: Any, preprocessor: Preprocessor, tokenizer: TextTokenizer | None = None
) -> Callable[[Mapping[str, Tensor], Path], None]:
    """What writes the model's folder, given its weights; a patch codebook that targets came from goes there, too (other
    image tokenizers have folders of their own).
    """
    text = f"Trained by `multiway train {run.recipe}` for {run.schedule.steps} steps."

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        pretrained.save_pretrained(
            objective.model, folder, tokenizer=tokenizer, preprocessor=dataclasses.asdict(preprocessor),
            card={"title": run.recipe, "text": text}, weights=weights,
        )  # fmt: skip
        book = getattr(objective, "tokenizer", None)
        if isinstance(book, PatchCodebook) and book.centroids.any():  # none is fitted where no picture is learned from
            save_file(dict(book.state_dict()), folder / IMAGE_TOKENIZER)

    return export


def open_pictures(data: Data, folder: Path, split: str | None = None) -> Corpus:
    """As `open_corpus`; pictures with captions are pictures, too, because nothing here reads the captions."""
    corpus = open_corpus(data, folder, split)
    shares: dict[Any, float] = {}
    for kind in ("image", "pair"):
        shares |= zip(corpus.sources[kind], corpus.weights[kind] or repeat(1.0), strict=False)
    weights = list(shares.values()) if data.more else None
    return dataclasses.replace(
        corpus, sources={**corpus.sources, "image": list(shares)}, weights={**corpus.weights, "image": weights}
    )


def no_words() -> Words:
    """A vocabulary of nothing."""
    return Words(bos=0, eos=0, mask_id=0, first=0, stop=0, longest=0, window=0)


def named_classes(shape: Any, corpus: Corpus) -> Any:
    """The config with as many classes as the data; raises ConfigError when it says another number."""
    found = len(corpus.labels)
    if shape.classes not in (0, found):
        raise ConfigError(
            f"the data has {found} classes, model.classes is {shape.classes}: set it to {found}, or to 0, which takes "
            "the number from the data"
        )
    return dataclasses.replace(shape, classes=found)


def val_corpus(run: Run, out: Path) -> Corpus | None:
    """What is held out: the split ``val`` of the root, of embedded scenes other writers', or nothing."""
    if run.data.root is None:
        return digit_corpus(run.seed, held_out=True)
    if run.data.split is None and "val" in splits(run.data.root):
        return open_pictures(dataclasses.replace(run.data, more={}), out / "index", split="val")
    return None


def training_view(run: Run) -> View:
    """How pictures are shown while training."""
    data = run.data
    augment = None
    if getattr(run.objective, "augment", False):
        fill = tuple(round(255 * x) for x in run.model.mean)
        augment = RandAugment(fill=fill)  # type: ignore[arg-type]
    return View(
        px=run.model.image_px, scale=None if data.image_scale == 1 else (data.image_scale, 1.0),
        interpolation=data.interpolation, flip=0.5 if data.flip else 0.0, augment=augment, jitter=data.jitter,
    )  # fmt: skip


def evaluation_view(run: Run) -> View:
    """How pictures are shown when measured: the centre, as the model's config says."""
    return View(px=run.model.image_px, share=getattr(run.model, "share", None))


def some_of(corpus: Corpus) -> Iterator[list[tuple[Any, int]]]:
    """Held-out pictures as (source, record) in batches: evenly spread over the records, at most HELD_OUT."""
    records = [(source, i) for source in corpus.sources["image"] for i in range(len(source))]
    records = records[:: max(1, math.ceil(len(records) / HELD_OUT))]
    for start in range(0, len(records), BATCH):
        yield records[start : start + BATCH]


def labelled(corpus: Corpus, view: View, labels: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out pictures in batches, uint8 (B, 3, H, W), and their classes' numbers among ``labels``, int64 (B,).

    Raises DataError for a class that is not among them, or a picture without one.
    """
    require_labels(corpus)
    if unknown := sorted(set(corpus.labels) - set(labels)):
        raise DataError(f"held-out pictures have {len(unknown)} classes the training has not: {', '.join(unknown[:5])}")
    number = [labels.index(name) for name in corpus.labels]
    for some in some_of(corpus):
        images = torch.stack([view(source.image(i, view.source_px)) for source, i in some])
        yield images, torch.tensor([number[source.label(i)] for source, i in some])


def held_out_loss(
    objective: Objective, collate: Callable[[Samples], Batch], corpus: Corpus, view: View, seed: int
) -> dict[str, float]:
    """Mean of every term of a pre-training objective over held-out pictures, the same patches hidden every time."""
    quiet: Any = dataclasses.replace(collate, branches=0)  # type: ignore[type-var]
    total, sums = Counter[str](), Counter[str]()
    device = next(objective.parameters()).device
    count = 0
    for number, some in enumerate(some_of(corpus)):
        samples = [
            Sample(image=view(source.image(i, view.source_px)), record=i, rng=generator(seed, "held out", number, i))
            for source, i in some
        ]
        batch = move(quiet({"image": samples}), device)
        counts = objective.counts(batch)
        found = type(objective).forward(objective, batch, counts)  # a sharded objective's hooks are for training
        sums.update({name: float(value) for name, value in found.sums.items()})
        total.update(counts)
        count += len(samples)
    return {name: value / total[name.partition("/")[0]] for name, value in sums.items()} | {"pictures": count}


def start_from(model: Any, folder: str) -> None:
    """Fill a model's encoder with the weights of a folder, resized to its pictures; heads stay as they are unless the
    folder holds the same kind of model.

    A relative bias that all blocks share there is given to every block here. Raises ConfigError when weights of the
    encoder are missing there, or have other shapes.
    """
    source: Any = pretrained.load(folder).model
    source.set_image_size(model.config.image_px)
    given, own = source.state_dict(), model.state_dict()
    shared = given.get("encoder.bias.table")
    if shared is not None:
        of_blocks = [name for name in own if name.startswith("encoder.blocks.") and name.endswith(".bias.table")]
        given |= {name: shared.clone() for name in of_blocks}
    same = type(source) is type(model)
    fits = {k for k in own if k in given and given[k].shape == own[k].shape and (same or k.startswith("encoder."))}
    lacking = [f"{name} {tuple(own[name].shape)}" for name in own if name.startswith("encoder.") and name not in fits]
    if lacking:
        raise ConfigError(f"{folder} does not fit this model's encoder: it has no {', '.join(lacking[:5])}")
    model.load_state_dict({name: given[name] if name in fits else tensor for name, tensor in own.items()})
    new, left = (parts_of(name for name in names if name not in fits) for names in (own, given))
    CONSOLE.print(f"weights from {folder}: {len(fits)} tensors; new here: {new}; not needed from there: {left}")


def parts_of(names: Iterable[str]) -> str:
    """The parts of a model that names of weights belong to, with their numbers."""
    counted = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{part} ({number})" for part, number in counted.items()) or "nothing"


def grid_of(shape: Any) -> tuple[int, int]:
    """Rows and columns of patches of a config."""
    return whole_patches(shape.image_px, shape.patch)


def hiding_collate(run: Run, model: Any, *, keep: bool = False) -> PictureCollate:
    """The collate of a run that hides patches of its model's grid."""
    grid = grid_of(run.model)
    rates = branches(model) if hasattr(model.config, "drop_path") else 0
    return PictureCollate(hide=run.objective.of(grid, run.model.patch), keep=keep, branches=rates)


def plain_collate(branches: int = 0) -> PictureCollate:
    """Batches of pictures with nothing hidden."""
    return PictureCollate(branches=branches)


def no_tokenizer(run: Run) -> ImageTokenizer:
    """An image tokenizer of nothing, for a rehearsal, and until `build` has the right one."""
    return PatchCodebook(run.model.codes, run.model.patch)


# ------------------------------------------------------------------------------------------------ runs on two CPU cores

IMAGENET = 1_281_167
"""Training pictures of ImageNet-1k, which epochs of the published recipes count."""

QUICK = {"patch": 8, "image_px": 64}
"""What the micro models of the presets are changed to for embedded scenes."""


def quick(recipe: str, model: Any, objective: Any, **changes: Any) -> Run:
    """Pre-training of a micro model in minutes; sizes and rates are ours."""
    run = Run(
        recipe=recipe,
        model=dataclasses.replace(model, **QUICK),
        objective=objective,
        data=Data(images=128, image_scale=0.5, flip=False, jitter=0.0),
        optim=Optim(lr=1e-3, matrices="muon"),
        schedule=Schedule(steps=800, warmup=80),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=200),
    )
    return dataclasses.replace(run, **changes)


def quick_tune(recipe: str, model: Any) -> Run:
    """Fine-tuning of a micro model in minutes; sizes and rates are ours."""
    return quick(
        recipe, model, LIGHT, optim=Optim(lr=5e-4, matrices="muon", layer_decay=0.75),
        schedule=Schedule(steps=400, warmup=40),
    )  # fmt: skip


def imagenet(
    recipe: str, model: Any, objective: Any, *, batch: int, epochs: float, warmup: float, scale: float, lr: float,
    final_lr: float, first_lr: float = 0.0, shape: Any = "cosine", interpolation: Any = "bicubic", jitter: float = 0.0,
    pictures: int = IMAGENET, **optim: Any,
) -> Run:  # fmt: skip
    """A published run on ImageNet: epochs become steps; ``scale``: least share of a picture that a crop keeps."""
    epoch = pictures / batch
    return Run(
        recipe=recipe,
        model=model,
        objective=objective,
        data=Data(images=batch, image_scale=scale, jitter=jitter, interpolation=interpolation, workers=8),
        optim=Optim(**{"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, **optim}),
        schedule=Schedule(
            steps=round(epochs * epoch), warmup=round(warmup * epoch), first_lr=first_lr, final_lr=final_lr, shape=shape
        ),
    )
