"""Evaluating any model folder on any data: what ``multiway evaluate`` calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from multiway import pretrained
from multiway.data import builtin
from multiway.data.index import Index, build
from multiway.errors import DataError
from multiway.pretrained import Pretrained
from multiway.tasks import retrieval, zero_shot
from multiway.tasks.needs import check

SCENES = 1000
"""Embedded held-out scenes an evaluation without data uses."""


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
    if task == "retrieval":
        return _retrieval(model, data, split)
    return _zero_shot(model, data, split, prompts or ("{}",))


def _retrieval(model: Pretrained, data: str | None, split: str | None) -> dict[str, Any]:
    if data is None:
        scenes = builtin.retrieval_scenes(SCENES)
        captions = [captions[0] for captions in scenes.captions]
        return retrieval.evaluate(model.encode_image, model.encode_text, torch.from_numpy(scenes.images), captions)
    images, captions, owner = [], [], []
    with indexed(model, data, split) as index:
        for source in index.sources:
            for record in range(len(source)) if source.kind == "pair" else ():
                strings = source.strings(record)
                owner += [len(images)] * len(strings)
                captions += strings
                images.append(model.picture(source.image(record, model.preprocessor.image_px)))
    if not images:
        raise DataError(f"{data} has no picture with a caption: retrieval needs pairs")
    return retrieval.evaluate(model.encode_image, model.encode_text, torch.stack(images), captions, owner)


def _zero_shot(model: Pretrained, data: str | None, split: str | None, prompts: Sequence[str]) -> dict[str, Any]:
    if data is None:
        scenes, digits = builtin.one_digit_scenes(SCENES)
        pictures = torch.from_numpy(scenes.images)
        return dict(
            zero_shot.evaluate(model.encode_image, model.encode_text, pictures, digits, builtin.digit_prompts())
        )
    images, labels = [], []
    with indexed(model, data, split) as index:
        for source in index.sources:
            for record in range(len(source)) if source.kind != "text" else ():
                if (label := source.label(record)) is not None:
                    images.append(model.picture(source.image(record, model.preprocessor.image_px)))
                    labels.append(label)
        classes = index.labels
    if not images:
        raise DataError(f"{data} has no picture with a class (its folder's name): zero_shot needs labels")
    texts = [[prompt.replace("{}", name.replace("_", " ")) for prompt in prompts] for name in classes]
    return dict(zero_shot.evaluate(model.encode_image, model.encode_text, torch.stack(images), labels, texts))


@contextmanager
def indexed(model: Pretrained, data: str, split: str | None) -> Iterator[Index]:
    """The data as an index: the one it is, or one made aside, in which no record may be bad."""
    if (Path(data) / "manifest.json").is_file():
        yield Index.open(data)
        return
    with TemporaryDirectory() as aside:
        yield build(data, Path(aside) / "index", split=split, tokenizer=model.tokenizer, max_bad_fraction=0.0)
