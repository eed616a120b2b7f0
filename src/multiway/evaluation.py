"""Measuring a model on scenes and on any data: what recipes report and what ``multiway evaluate`` calls."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from multiway import pretrained
from multiway.data import builtin
from multiway.data.collate import Sample, Samples
from multiway.data.index import Index, build
from multiway.data.order import generator
from multiway.data.picture import Picture
from multiway.data.prepare import Source, digit_corpus, splits
from multiway.data.text import framed
from multiway.engine.log import CONSOLE
from multiway.errors import ConfigError, DataError, WriteError
from multiway.metrics.caption import Unit
from multiway.nn.quantize import ImageTokenizer
from multiway.pretrained import Pretrained
from multiway.tasks import captioning, fill, image_classification, linear_probe, retrieval, zero_shot
from multiway.tasks.needs import check
from multiway.tasks.prompts import BARE, class_names
from multiway.types import Batch
from multiway.weights.io import write

TASKS = {
    "retrieval": retrieval.ImageTextContrast.needs,
    "zero_shot": zero_shot.NEEDS,
    "image_classification": image_classification.NEEDS,
    "linear_probe": image_classification.NEEDS,
    "captioning": captioning.NEEDS,
}
"""What `evaluate_model` measures, and what a model must encode for it."""

BATCH = 64
FOLD = 5
COCO_NAME = re.compile(r"(?:^|[/_])(\d{12})\.\w+$")

HELD_OUT = 1000
"""Embedded held-out scenes, and pictures of a validation split, that are measured on at most."""


def evaluate_model(
    source: str,
    task: str,
    data: str | None = None,
    split: str | None = None,
    prompts: Sequence[str] | None = None,
    unit: Unit = "words",
    predictions: str | None = None,
    classes: str | None = None,
    rerank: str | None = None,
    top: int = retrieval.TOP,
) -> dict[str, Any]:
    """Figures of a model on a task.

    ``source``: a model folder, a run folder (its ``final/`` is taken) or a hub id; ``task``: ``retrieval`` or
    ``captioning`` (pictures with captions), ``zero_shot``, ``image_classification`` or ``linear_probe`` (pictures in
    folders named after their class); ``data``: None = embedded scenes; ``prompts``: zero-shot templates with ``{}`` for
    the class, None = its name alone; ``classes``: file with the names of the classes, as
    `multiway.tasks.prompts.class_names` reads it, None = those of the folders; ``unit``: what captions are cut into to
    be compared; ``predictions``: file to write captions to, as the official scorer reads them, None = not written;
    ``rerank``: a model, as ``source``, that reads pictures and texts together and orders the ``top`` nearest anew.

    An evaluation tolerates no bad record: it raises DataError (65) and names it.
    """
    if rerank is not None and task != "retrieval":
        raise ConfigError(f"a model re-ranks what retrieval finds, but the task is {task}")
    if (prompts or classes) and (task != "zero_shot" or data is None):
        raise ConfigError("prompts and names of classes belong to zero_shot, of pictures that --data names")
    model = pretrained.load(source)
    check(model.model, TASKS[task], task)
    other = None if rerank is None else model if rerank == source else pretrained.load(rerank)
    if other is not None:
        retrieval.require_match(other.model)
    if task == "captioning":
        captioning.require(model.model)
        if data is None and predictions is None:
            return captioning_of_scenes(model)
        if data is None:
            raise ConfigError("predictions are written for pictures that somebody scores: name them with --data")
        with indexed(model, data, split) as index:
            return captioning_of(model, index.sources, unit=unit, predictions=predictions)
    if task == "linear_probe":
        return probe_of(model, data, split)
    if data is None and task != "image_classification":
        return retrieval_of_scenes(model, 0, other, top) if task == "retrieval" else zero_shot_of_scenes(model)
    if data is None:
        raise ConfigError("image_classification needs --data: pictures in folders named after their class")
    with indexed(model, data, split) as index:
        if task == "retrieval":
            return retrieval_of(model, index.sources, None, other, top)
        if task == "image_classification":
            return classification_of(model, index)
        return zero_shot_of(model, index, prompts or (BARE,), classes)


def retrieval_of_scenes(
    model: Pretrained, seed: int = 0, rerank: Pretrained | None = None, top: int = retrieval.TOP
) -> dict[str, Any]:
    """Retrieval among 1,000 scenes by writers the training never saw, with 1,000 different captions; ``rerank``,
    ``top`` as in `evaluate_model`."""
    scenes = builtin.retrieval_scenes(HELD_OUT, seed)
    images, captions = torch.from_numpy(scenes.images), [captions[0] for captions in scenes.captions]
    scores = rerank and pair_scores(rerank, images.__getitem__, captions)
    return retrieval.evaluate(model.encode_image, model.encode_text, images, captions, None, scores, top)


def zero_shot_of_scenes(model: Pretrained, seed: int = 0) -> dict[str, Any]:
    """Naming the digit of held-out scenes that hold one."""
    scenes, digits = builtin.one_digit_scenes(HELD_OUT, seed)
    images, prompts = torch.from_numpy(scenes.images), builtin.digit_prompts()
    return dict(zero_shot.evaluate(model.encode_image, model.encode_text, images, digits, prompts))


def filling_of_scenes(
    model: Pretrained, tokenizer: ImageTokenizer, collate: Callable[[Samples], Batch], seed: int = 0
) -> dict[str, Any]:
    """Filling in held-out scenes and their captions; of the patches those that show handwriting count."""
    scenes = builtin.retrieval_scenes(HELD_OUT, seed)
    assert model.tokenizer is not None, "captions need a tokenizer"
    ids = model.tokenizer.batch([captions[0] for captions in scenes.captions])
    pairs = [
        Sample(image=torch.from_numpy(image), text=text, record=i, rng=generator(seed, "fill", i))
        for i, (image, text) in enumerate(zip(scenes.images, ids, strict=True))
    ]
    shape: Any = model.model.config
    return fill.evaluate(model.model, tokenizer, pairs, collate, builtin.ink_patches(scenes, shape.patch))


def retrieval_of(
    model: Pretrained,
    sources: Iterable[Source],
    most: int | None = None,
    rerank: Pretrained | None = None,
    top: int = retrieval.TOP,
) -> dict[str, Any]:
    """Retrieval among the pictures of pairs, with all their captions; ``most``: how many of each source, None = all;
    ``rerank``, ``top`` as in `evaluate_model`."""
    records = [(s, i) for s in sources if s.kind == "pair" for i in range(min(len(s), most or len(s)))]
    if not records:
        raise DataError("no picture has a caption: retrieval needs pairs")
    told = [source.strings(i) for source, i in records]
    captions = [text for own in told for text in own]
    owner = np.repeat(np.arange(len(told)), [len(own) for own in told])

    def picture(number: int) -> Tensor:
        source, i = records[number]
        return source.image(i, (rerank or model).source_px)

    scores = rerank and pair_scores(rerank, picture, captions)
    return retrieval.evaluate(partial(vectors, model), model.encode_text, records, captions, owner, scores, top)


def pair_scores(
    model: Pretrained, picture: Callable[[int], Picture], captions: Sequence[str]
) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    """What says how well pictures and captions fit, told by their numbers, with a model that reads both together.

    Raises ConfigError for a model that cannot, or has no tokenizer.
    """
    retrieval.require_match(model.model)
    words, longest = model.tokenizer, model.preprocessor.text_tokens
    if words is None:
        raise ConfigError(f"{model.name or 'the model'} has no tokenizer: captions need the one it was trained with")
    ids = [torch.from_numpy(framed(own, words.bos, words.eos, longest)) for own in words.batch(captions)]
    seen = lru_cache(BATCH)(lambda number: model.picture(picture(number)))  # pairs come picture by picture

    def scores(pictures: np.ndarray, texts: np.ndarray) -> Tensor:
        found = []
        for start in track(range(0, len(texts), BATCH), "re-ranking", console=CONSOLE):
            part = slice(start, start + BATCH)
            image = torch.stack([seen(number) for number in pictures[part].tolist()]).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bf16"):
                found.append(retrieval.match(model.model, image, [ids[number] for number in texts[part]]).cpu())
        return torch.cat(found)

    return scores


def captions(
    model: Pretrained,
    pictures: Iterable[Picture],
    *,
    beams: int = captioning.BEAMS,
    length_penalty: float = captioning.LENGTH_PENALTY,
) -> list[str]:
    """A caption for each picture, at most as long as the texts the model was tuned on; pictures may be a Tensor uint8
    (N, 3, H, W).

    Raises ConfigError for a model that writes no captions or has no tokenizer; otherwise as `Pretrained.picture`.
    """
    captioning.require(model.model)
    if beams < 1:
        raise ConfigError(f"captions are searched for with one beam or more, got {beams}")
    words = model.tokenizer
    if words is None:
        raise ConfigError(f"{model.name or 'the model'} has no tokenizer: captions need the one it was tuned with")
    found, left = [], iter(pictures)
    while some := [model.picture(picture) for picture in islice(left, BATCH)]:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bf16"):
            found += captioning.generate(
                model.model, torch.stack(some).to(model.device), bos=words.bos, eos=words.eos, mask_id=words.hide,
                longest=model.preprocessor.text_tokens, beams=beams, length_penalty=length_penalty,
            )  # fmt: skip
    return [words.text(ids) for ids in found]


def captioning_of(
    model: Pretrained,
    sources: Iterable[Source],
    most: int | None = None,
    *,
    unit: Unit = "words",
    predictions: str | None = None,
    **search: Any,
) -> dict[str, Any]:
    """Captions of the pictures of pairs against all that these have; ``most``: how many of each source, None = all.

    ``predictions``: file to write them to in COCO's format, ``[{"image_id": ..., "caption": ...}, ...]``; the id is the
    number in a name such as COCO has, else the name; ``search``: settings of `captions`. Raises WriteError when the
    disk refuses.
    """
    pairs = [(s, i) for s in sources if s.kind == "pair" for i in range(min(len(s), most or len(s)))]
    if not pairs:
        raise DataError("no picture has a caption: captioning is measured on pairs")
    found = captions(model, (source.image(i, model.source_px) for source, i in pairs), **search)
    if predictions is not None:
        keys = [image_id(source.key(i)) for source, i in pairs]
        rows = [{"image_id": key, "caption": text} for key, text in zip(keys, found, strict=True)]
        try:
            write(Path(predictions), lambda path: path.write_text(json.dumps(rows), encoding="utf-8"))
        except OSError as error:
            raise WriteError(f"cannot write the captions to {predictions}: {error}") from error
    return captioning.evaluate(found, [source.strings(i) for source, i in pairs], unit)


def image_id(key: str) -> int | str:
    """The number of a picture named as COCO names them (``COCO_val2014_000000391895.jpg``), else the key itself."""
    number = COCO_NAME.search(key)
    return int(number[1]) if number else key


def captioning_of_scenes(model: Pretrained, seed: int = 0, **search: Any) -> dict[str, Any]:
    """Captions of held-out scenes against all that these have; ``search``: settings of `captions`."""
    scenes = builtin.retrieval_scenes(HELD_OUT, seed)
    return captioning.evaluate(captions(model, torch.from_numpy(scenes.images), **search), scenes.captions)


Records = Sequence[tuple[Source, int]]
"""Pictures as their sources and numbers, so that not all of them are in memory."""


def vectors(model: Pretrained, records: Records) -> Tensor:
    """Unit vectors (N, D) of pictures, which are read as they are needed."""
    return model.encode_image(source.image(i, model.source_px) for source, i in records)


def zero_shot_of(
    model: Pretrained, index: Index, prompts: Sequence[str] = (BARE,), classes: str | None = None
) -> dict[str, Any]:
    """Naming the class of pictures, which is the name of their folder; ``prompts``: templates with ``{}``; ``classes``:
    file with better names, as `multiway.tasks.prompts.class_names` reads it."""
    records, labels = labelled(index, "zero_shot")
    names = class_names(index.labels, classes)
    return zero_shot.compare(partial(vectors, model), model.encode_text, records, labels, names, prompts)


def classify(
    model: Pretrained, pictures: Sequence[Picture], classes: Sequence[str] = (), prompts: Sequence[str] = (BARE,)
) -> tuple[list[str], Tensor]:
    """Names of classes, and their probabilities for each picture, float32 (N, C).

    With ``classes`` as `Pretrained.zero_shot`, without as `Pretrained.classify`, whose classes are numbers where the
    model does not know their names. Raises ConfigError as they do.
    """
    if classes:
        return list(classes), model.zero_shot(pictures, classes, prompts)
    if not getattr(model.model.config, "classes", 0):  # type: ignore[union-attr]
        raise ConfigError(f"{model.name} has no classifier: say which classes there are, --classes cat,dog,...")
    found = model.classify(pictures)
    return model.preprocessor.labels or [str(number) for number in range(found.shape[1])], found


def labelled(index: Index, task: str) -> tuple[Records, list[int]]:
    """All pictures that have a class, and the numbers of their classes."""
    found = [(source, i) for source in index.sources if source.kind != "text" for i in range(len(source))]
    labels = [source.label(i) for source, i in found]
    known = [label for label in labels if label is not None]
    if not known:
        raise DataError(f"no picture lies in a folder named after its class: {task} needs labels")
    return [record for record, label in zip(found, labels, strict=True) if label is not None], known


def classification_of(model: Pretrained, index: Index) -> dict[str, Any]:
    """Accuracy of a model's own classifier on pictures whose classes are named as the model's."""
    shape: Any = model.model.config
    if not (classes := getattr(shape, "classes", 0)):
        raise ConfigError(f"{model.name} has no classifier: tune it to classes first, or measure a linear_probe")
    records, labels = labelled(index, "image_classification")
    known = model.preprocessor.labels or list(index.labels)
    unknown = [name for name in index.labels if name not in known]
    if unknown or len(known) != classes:
        raise ConfigError(
            f"the model has {classes} classes ({', '.join(known[:5])}, ...), the data {len(index.labels)}, of "
            f"which the model does not know {', '.join(unknown[:5]) or 'the order'}"
        )
    truth = torch.tensor([known.index(index.labels[label]) for label in labels])
    return dict(
        image_classification.evaluate(model.model, zip(batches(model, records), truth.split(BATCH), strict=True))
    )


def probe_of(model: Pretrained, data: str | None, split: str | None) -> dict[str, Any]:
    """Linear and nearest-neighbour accuracy on frozen features of pictures with classes.

    Fitted on the split ``train`` and tested on ``val``; of data without these, or of one named split, every fifth
    picture is the test. No data = embedded digits, those of other writers being the test.
    """
    if data is None:
        parts = [corpus.sources["image"][0] for corpus in (digit_corpus(0), digit_corpus(0, held_out=True))]
        fit, test = ([(own, i) for i in range(len(own))] for own in parts)
        y, truth = ([source.label(i) for source, i in records] for records in (fit, test))
        return dict(linear_probe.evaluate(features(model, fit), y, features(model, test), truth))  # type: ignore[arg-type]
    if split is None and not (Path(data) / "manifest.json").is_file() and splits(data) == ["train", "val"]:
        with indexed(model, data, "train") as own, indexed(model, data, "val") as other:
            (fit, y), (test, truth) = (labelled(index, "linear_probe") for index in (own, other))
            if missing := set(other.labels) - set(own.labels):
                raise DataError(f"classes of val that train has not: {', '.join(sorted(missing)[:5])}")
            truth = [own.labels.index(other.labels[label]) for label in truth]
            return dict(linear_probe.evaluate(features(model, fit), y, features(model, test), truth))
    with indexed(model, data, split) as index:
        records, labels = labelled(index, "linear_probe")
        found, y = features(model, records), np.asarray(labels)
    test = np.arange(len(y)) % FOLD == 0
    return dict(linear_probe.evaluate(found[~test], y[~test], found[test], y[test]))


def features(model: Pretrained, records: Records) -> Tensor:
    """What a classifier would read of pictures: float32 (N, D)."""
    encoder: Any = model.model
    with torch.inference_mode():
        found = [encoder.pool(encoder.encode(image=image)).float().cpu() for image in batches(model, records)]
    return torch.cat(found).clone()


def batches(model: Pretrained, records: Records) -> Iterator[Tensor]:
    """Pictures as the model sees them, uint8 (B, 3, H, W), on its device."""
    for start in range(0, len(records), BATCH):
        some = records[start : start + BATCH]
        yield torch.stack([model.picture(source.image(i, model.source_px)) for source, i in some]).to(model.device)


@contextmanager
def indexed(model: Pretrained, data: str, split: str | None) -> Iterator[Index]:
    """The data as an index: the one it is, or one made aside, in which no record may be bad."""
    if (Path(data) / "manifest.json").is_file():
        yield Index.open(data).of()
        return
    with aside() as folder:
        yield build(data, folder / "index", split=split, tokenizer=model.tokenizer, max_bad_fraction=0.0)


@contextmanager
def aside() -> Iterator[Path]:
    """A folder for what is needed once; it stays where an error says what is listed in it."""
    folder = Path(mkdtemp(prefix="multiway-"))
    try:
        yield folder
    except DataError:
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
