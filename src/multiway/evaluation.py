"""Measuring a model on scenes and on any data: what recipes report and what ``multiway evaluate`` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from multiway import pretrained
from multiway.data import builtin
from multiway.data.collate import Sample, Samples
from multiway.data.index import Index, build
from multiway.data.order import generator
from multiway.data.prepare import Source
from multiway.errors import DataError
from multiway.nn.quantize import PatchCodebook
from multiway.pretrained import Pretrained
from multiway.tasks import fill, retrieval, zero_shot
from multiway.tasks.needs import check
from multiway.types import Batch

HELD_OUT = 1000
"""Embedded held-out scenes, and pictures of a validation split, that are measured on at most."""


def evaluate_model(
    source: str, task: str, data: str | None = None, split: str | None = None, prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Figures of a model on a task.

    ``source``: a model folder, a run folder (its ``final/`` is taken) or a hub id; ``task``: ``retrieval`` (pictures
    with captions) or ``zero_shot`` (pictures in folders named after their class); ``data``: None = the embedded
    held-out scenes; ``prompts``: zero-shot templates with ``{}`` for the class.

    An evaluation tolerates no bad record: it raises DataError (65) and names it.
    """
    folder = Path(source) / "final"
    model = pretrained.load(folder if folder.is_dir() else source)
    needs = {"retrieval": retrieval.ImageTextContrast.needs, "zero_shot": zero_shot.NEEDS}[task]
    check(model.model, needs, task)
    if data is None:
        return retrieval_of_scenes(model) if task == "retrieval" else zero_shot_of_scenes(model)
    with indexed(model, data, split) as index:
        if task == "retrieval":
            return retrieval_of(model, index.sources)
        return zero_shot_of(model, index, prompts or ("{}",))


def retrieval_of_scenes(model: Pretrained, seed: int = 0) -> dict[str, Any]:
    """Retrieval among 1,000 scenes by writers the training never saw, with 1,000 different captions."""
    scenes = builtin.retrieval_scenes(HELD_OUT, seed)
    captions = [captions[0] for captions in scenes.captions]
    return retrieval.evaluate(model.encode_image, model.encode_text, torch.from_numpy(scenes.images), captions)


def zero_shot_of_scenes(model: Pretrained, seed: int = 0) -> dict[str, Any]:
    """Naming the digit of held-out scenes that hold one."""
    scenes, digits = builtin.one_digit_scenes(HELD_OUT, seed)
    images, prompts = torch.from_numpy(scenes.images), builtin.digit_prompts()
    return dict(zero_shot.evaluate(model.encode_image, model.encode_text, images, digits, prompts))


def filling_of_scenes(
    model: Pretrained, tokenizer: PatchCodebook, collate: Callable[[Samples], Batch], seed: int = 0
) -> dict[str, Any]:
    """Filling in held-out scenes and their captions; of the patches those that show handwriting count."""
    scenes = builtin.retrieval_scenes(HELD_OUT, seed)
    assert model.tokenizer is not None, "captions need a tokenizer"
    ids = model.tokenizer.batch([captions[0] for captions in scenes.captions])
    pairs = [
        Sample(image=torch.from_numpy(image), text=text, record=i, rng=generator(seed, "fill", i))
        for i, (image, text) in enumerate(zip(scenes.images, ids, strict=True))
    ]
    return fill.evaluate(model.model, tokenizer, pairs, collate, builtin.ink_patches(scenes, tokenizer.patch))


def retrieval_of(model: Pretrained, sources: Iterable[Source], most: int | None = None) -> dict[str, Any]:
    """Retrieval among the pictures of pairs, with all their captions; ``most``: how many of each source, None = all."""
    images, captions, owner = [], [], []
    for source in sources:
        for record in range(min(len(source), most or len(source))) if source.kind == "pair" else ():
            strings = source.strings(record)
            owner += [len(images)] * len(strings)
            captions += strings
            images.append(model.picture(source.image(record, model.preprocessor.image_px)))
    if not images:
        raise DataError("no picture has a caption: retrieval needs pairs")
    return retrieval.evaluate(model.encode_image, model.encode_text, torch.stack(images), captions, owner)


def zero_shot_of(model: Pretrained, index: Index, prompts: Sequence[str]) -> dict[str, Any]:
    """Naming the class of pictures, which is the name of their folder; ``prompts``: templates with ``{}``."""
    images, labels = [], []
    for source in index.sources:
        for record in range(len(source)) if source.kind != "text" else ():
            if (label := source.label(record)) is not None:
                images.append(model.picture(source.image(record, model.preprocessor.image_px)))
                labels.append(label)
    if not images:
        raise DataError("no picture lies in a folder named after its class: zero_shot needs labels")
    texts = [[prompt.replace("{}", name.replace("_", " ")) for prompt in prompts] for name in index.labels]
    return dict(zero_shot.evaluate(model.encode_image, model.encode_text, torch.stack(images), labels, texts))


@contextmanager
def indexed(model: Pretrained, data: str, split: str | None) -> Iterator[Index]:
    """The data as an index: the one it is, or one made aside, in which no record may be bad."""
    if (Path(data) / "manifest.json").is_file():
        yield Index.open(data)
        return
    with TemporaryDirectory() as aside:
        yield build(data, Path(aside) / "index", split=split, tokenizer=model.tokenizer, max_bad_fraction=0.0)
