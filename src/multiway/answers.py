"""Answers of a model to questions: asked by hand, and measured on examples, as recipes and ``multiway evaluate`` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from multiway import pretrained
from multiway.backbones.vit import whole_patches
from multiway.data.collate import Words
from multiway.data.examples import ExampleCollate, Question, join
from multiway.data.image import View
from multiway.data.picture import Picture
from multiway.data.prepare import splits, words_of
from multiway.data.questions import ExampleCorpus, Source, open_examples, scene_examples
from multiway.errors import ConfigError, WriteError
from multiway.evaluation import aside
from multiway.pretrained import Pretrained
from multiway.run import Data
from multiway.tasks import answering, entailment, nlvr2, text_classification, vqa
from multiway.types import Batch
from multiway.weights.io import write

Task = Literal["vqa", "nlvr2", "entailment", "text_classification"]
"""What is asked."""

BATCH = 64
VALUE = "value"
"""Name of the only answer of a model that predicts numbers."""

Target = Callable[[Question], Mapping[str, Any]]


@dataclass(frozen=True)
class Known:
    """The answers a model learns to choose from, and how right they are to a question of the data."""

    names: tuple[str, ...]
    targets: Target

    @classmethod
    def of(cls, corpus: ExampleCorpus, task: str, least: int, number: bool) -> Known:
        """Those of the training examples; ``least``: as in `vqa.vocabulary`; ``number``: whether answers are numbers.

        Raises DataError when no answer is frequent enough, or one is no number.
        """
        if number:
            return cls((VALUE,), answering.ValueTarget(corpus.labels))
        if task == "vqa":
            names = vqa.vocabulary((told(corpus, source, i) for source, i in corpus.records), least)
            return cls(tuple(names), vqa.ScoreTarget(corpus.labels, names))
        return cls(corpus.labels, answering.ClassTarget(corpus.labels, corpus.labels))


def is_number(task: str, data_set: str) -> bool:
    """Whether a data set of a task is answered by numbers."""
    found = text_classification.glue(data_set) if task == "text_classification" else None
    return found is not None and not found.classes


def told(corpus: ExampleCorpus, source: Source, i: int) -> list[str]:
    """What people answered to an example."""
    return [corpus.labels[answer] for answer in source.answers(i)]


def answer(
    model: Pretrained, questions: Sequence[str | tuple[str, str]], pictures: Sequence[Sequence[Picture]] = ()
) -> Tensor:
    """Probabilities of the answers (N, answers) float32, on the CPU, which the preprocessor's ``labels`` name; of a
    model that predicts numbers, the numbers (N, 1).

    ``questions``: texts, or pairs of texts; ``pictures``: of each question, as many as the model reads, () = none.
    Answers of visual question answering are judged one by one, so that their probabilities do not sum to 1.

    Raises ConfigError for a model that answers nothing, and another number of pictures; otherwise as
    `Pretrained.picture`.
    """
    shape: Any = model.model.config
    wanted = getattr(shape, "pictures", 0)
    require(model, wanted)
    shown = list(pictures) or [()] * len(questions)
    if not questions or len(shown) != len(questions) or {len(own) for own in shown} != {wanted}:
        raise ConfigError(
            f"{model.name or 'the model'} reads {wanted} pictures with every text, got {len(questions)} texts and "
            f"{[len(own) for own in shown][:5]} pictures"
        )
    words, tokenizer = framing(model), model.tokenizer
    assert tokenizer is not None, "as `require` found"
    asked = [
        Question(
            images=tuple(model.picture(picture) for picture in own), answers=(), record=i,
            text=join(tokenizer.batch([text] if isinstance(text, str) else list(text)), words),
            rng=np.random.default_rng(0),
        )
        for i, (text, own) in enumerate(zip(questions, shown, strict=True))
    ]  # fmt: skip
    logits = torch.from_numpy(np.concatenate(list(scores(model, asked, len(asked)))))
    if model.preprocessor.labels == [VALUE]:
        return logits
    return logits.sigmoid() if model.preprocessor.task == "vqa" else logits.softmax(-1)


def require(model: Pretrained, pictures: int, task: str = "answering") -> None:
    """Raise ConfigError, saying what would fit, unless a model can answer texts with so many pictures."""
    answering.require(model.model, task, pictures)
    if model.tokenizer is None or not model.preprocessor.labels:
        raise ConfigError(f"{model.name or 'the model'} has no tokenizer, or no names of its answers: tune it first")


def measure(
    model: Pretrained, corpus: ExampleCorpus, task: Task, data_set: str = "", *, progress: bool = False
) -> tuple[dict[str, Any], str]:
    """Figures of a model's answers to all examples, {} where these have none, and its answers as the official scorer
    of the task reads them.

    ``data_set``: name of a set of GLUE, which decides what is measured. Raises ConfigError when the model does not do
    the task, or was tuned to other answers.
    """
    require(model, corpus.pictures, task)
    names, records = model.preprocessor.labels, corpus.records
    number = names == [VALUE]
    given: list[Any] = []
    for found in scores(model, questions_of(model, corpus), len(records), progress=progress):
        given += found[:, 0].tolist() if number else answering.chosen(found, names)
    keys = [source.key(i) for source, i in records]
    truth = [told(corpus, source, i) for source, i in records]
    if number != is_number(task, data_set) and data_set:
        raise ConfigError(f"{model.name} answers with {'numbers' if number else 'classes'}, {data_set} does not")
    return figures(task, data_set, number, given, truth, keys), written(task, data_set, given, keys)


def figures(
    task: Task, data_set: str, number: bool, given: Sequence[Any], truth: Sequence[list[str]], keys: Sequence[str]
) -> dict[str, Any]:
    """Figures of the examples that people answered; {} when there is none."""
    rows = [row for row in zip(given, truth, keys, strict=True) if row[1]]
    if not rows:
        return {}
    own, answers, names = zip(*rows, strict=True)
    if task == "vqa":
        return vqa.evaluate(own, answers)
    right = [people[0] for people in answers]
    if number:
        return text_classification.evaluate_values(own, [answering.value_of(name) for name in right])
    if task == "nlvr2":
        return nlvr2.evaluate(own, right, names)
    if task == "entailment":
        return entailment.evaluate(own, right)
    return text_classification.evaluate(own, right, data_set)


def written(task: Task, data_set: str, given: Sequence[Any], keys: Sequence[str]) -> str:
    """Answers as the official scorer reads them."""
    if task == "text_classification":
        return text_classification.predictions(keys, given, data_set)
    return {"vqa": vqa, "nlvr2": nlvr2, "entailment": entailment}[task].predictions(keys, given)


def questions_of(model: Pretrained, corpus: ExampleCorpus) -> Iterator[Question]:
    """All examples, pictures shown whole."""
    words, rng = framing(model), np.random.default_rng(0)
    view = View(px=model.preprocessor.image_px, share=model.preprocessor.share)
    for source, i in corpus.records:
        images = tuple(view(image) for image in source.images(i, view.source_px))
        text = join(source.texts(i), words)
        yield Question(images=images, text=text, answers=source.answers(i), record=i, rng=rng)


def scores(
    model: Pretrained, questions: Iterable[Question], count: int, *, progress: bool = False
) -> Iterator[np.ndarray]:
    """What a model's head says of questions, batch by batch: float32 (B, answers)."""
    shape: Any = model.model.config
    pictures = getattr(shape, "pictures", 0)
    collate = ExampleCollate(
        words=framing(model), grid=whole_patches(shape.image_px, shape.patch) if pictures else None,
        pictures=pictures, causal=getattr(model.model, "causal", False), leading=getattr(model.model, "leading", 1),
    )  # fmt: skip

    def batches() -> Iterator[Batch]:
        some: list[Question] = []
        for number, question in enumerate(questions, 1):
            some.append(question)
            if len(some) == BATCH or number == count:
                yield collate({"example": some})
                some = []

    console = Console(stderr=True, quiet=not progress)
    for batch in track(batches(), "answering", total=-(-count // BATCH), console=console):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bf16"):
            yield answering.predict(model.model, [batch])


def framing(model: Pretrained) -> Words:
    """What a model's texts are framed by."""
    assert model.tokenizer is not None, "a model that reads texts has a tokenizer"
    longest = model.preprocessor.text_tokens
    return words_of(model.tokenizer, longest, longest)


def evaluate(
    source: str,
    task: Task,
    data: str | None = None,
    split: str | None = None,
    data_set: str = "",
    predictions: str | None = None,
) -> dict[str, Any]:
    """Figures of a model on examples of a task.

    ``source``: a model folder, a run folder (its ``final/`` is taken) or a hub id; ``data``: the task's official files
    or your own (docs/questions.md), None = embedded examples; ``split``: None = the validation split where there are
    several; ``data_set``: name of a set of GLUE, "" = that of the folder; ``predictions``: file to write answers to as
    the official scorer reads them. Examples without answers are answered, and only written.

    An evaluation tolerates no bad record: it raises DataError (65) and names it. Raises WriteError when the disk
    refuses.
    """
    model = pretrained.load(source)
    pictures = getattr(model.model.config, "pictures", 0)  # type: ignore[union-attr]
    require(model, 0 if task == "text_classification" else max(1, pictures), task)
    with aside() as folder:
        if data is None:
            corpus = scene_examples(task, 0, tokenizer=model.tokenizer, held_out=True)
        else:
            given = Data(root=data, max_bad=0.0, window=model.preprocessor.text_tokens)
            if split is None and len(splits(data, task)) > 1:
                split = "val"
            corpus = open_examples(given, task, folder, split, model.tokenizer)
            data_set = data_set or Path(data).resolve().name
        found, text = measure(model, corpus, task, data_set, progress=True)
    if predictions is not None:
        try:
            write(Path(predictions), lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise WriteError(f"cannot write the answers to {predictions}: {error}") from error
    elif not found:
        raise ConfigError(f"{data} has no answers to compare with: say where to write the model's, --predictions FILE")
    return found
