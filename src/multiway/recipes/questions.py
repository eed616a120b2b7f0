"""What recipes that answer questions share: their settings, and how a run becomes a job. No recipe is named here.

A question is a text, or two, with no, one or two pictures; its answer is one of a fixed set, or a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from multiway import answers, pretrained
from multiway.answers import Task
from multiway.backbones.vit import whole_patches
from multiway.data.augment import PAIRED, RandAugment
from multiway.data.collate import Samples, Words
from multiway.data.examples import ExampleCollate, LoadExamples, Question
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import splits
from multiway.data.questions import ExampleCorpus, open_examples, scene_examples
from multiway.engine.log import CONSOLE
from multiway.engine.train import Job
from multiway.errors import ConfigError
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained
from multiway.recipes import pictures
from multiway.run import Checkpoint, Data, Optim, Parallel, Run, Schedule
from multiway.tasks.answering import KEYS, Answering, Loss
from multiway.types import Batch, Objective

Assemble = Callable[[Run, Words], tuple[Objective, Callable[[Samples], Batch]]]
"""A recipe module's ``assemble``."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answering. ``task``: what is asked, which also says how data are read (docs/questions.md); ``data_set``: name of
    the GLUE data set, which decides what is measured and whether answers are numbers; ``least``: questions that an
    answer must be the commonest of to be known (vqa); ``smoothing``: share of the probability spread over all answers;
    ``augment``: whether pictures are changed by RandAugment, too (masked.md 6.4)."""

    task: Task = "vqa"
    data_set: str = ""
    least: int = 9
    smoothing: float = 0.0
    augment: bool = False

    @property
    def number(self) -> bool:
        """Whether an answer is a number."""
        return answers.is_number(self.task, self.data_set)


def with_answers(run: Run) -> Any:
    """The model's config with at least one answer, for a rehearsal without data; raises ConfigError where the model
    cannot do the task.
    """
    return dataclasses.replace(run.model, answers=run.model.answers or 1)


def assemble(run: Run, model: Any, words: Words) -> tuple[Objective, Callable[[Any], Batch]]:
    """Objective and collate of a run that tunes a model to answer; batches have no answers yet.

    Raises ConfigError, saying what would fit, when the model does not encode what the task asks about.
    """
    settings: Answer = run.objective
    loss: Loss = "value" if settings.number else "scores" if settings.task == "vqa" else "classes"
    shown = 0 if settings.task == "text_classification" else getattr(run.model, "pictures", 1)
    collate = ExampleCollate(
        words=words, grid=whole_patches(run.model.image_px, run.model.patch) if shown else None, pictures=shown,
        branches=2 * model.layers if run.model.drop_path else 0, causal=getattr(model, "causal", False),
        leading=getattr(model, "leading", 1), targets=partial(made_up, loss, run.model.answers or 1),
    )  # fmt: skip
    return Answering(model, settings.task, shown, loss, settings.smoothing), collate


def made_up(loss: Loss, count: int, question: Question) -> Mapping[str, Any]:
    """A right answer to a question of a rehearsal."""
    return {KEYS[loss]: np.zeros(count) if loss == "scores" else 0}


def build(run: Run, out: Path, assemble: Assemble) -> Job:
    """Everything the loop needs to learn to answer; what is made once (the index) is kept below ``out``."""
    settings: Answer = run.objective
    with torch.device("meta"):
        assemble(run, pictures.no_words())  # refuses what the model cannot do before any data is read
    data = run.data
    if run.init and not data.tokenizer:
        data = dataclasses.replace(data, tokenizer=str(Path(run.init) / pretrained.TOKENIZER))
    corpus = open_corpus(run, data, out)
    known = answers.Known.of(corpus, settings.task, settings.least, settings.number)
    run = dataclasses.replace(run, model=fitting(run, corpus, known))
    torch.manual_seed(run.seed)
    objective, collate = assemble(run, corpus.words(data))
    assert isinstance(collate, ExampleCollate), "questions are collated as examples"
    model: Any = objective.model
    objective.init_weights()
    if run.init:
        start_from(model, run.init)
    tokenizer = corpus.tokenizer
    examples = Stream(kind="example", sources=corpus.sources, items=data.examples, seed=run.seed)
    load = LoadExamples(
        sources=corpus.sources, view=training_view(run) if corpus.pictures else None, seed=run.seed,
        words=corpus.words(data), decoder=data.decoder,
    )  # fmt: skip
    batches = Batches([examples], load, dataclasses.replace(collate, targets=known.targets))
    given = {"text_tokens": data.text_tokens, "labels": list(known.names), "task": settings.task}
    preprocessor = Preprocessor.of(run.model, tokenizer, given)
    held_out = held_out_examples(run, data, out, corpus)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        if held_out is None:
            return {}
        ready = Pretrained(model, tokenizer, preprocessor)
        return {settings.task: answers.measure(ready, held_out, settings.task, settings.data_set)[0]}

    export = pictures.export_of(run, objective, preprocessor, tokenizer)
    return Job(objective=objective, batches=batches, data_hash=corpus.hash, export=export, evaluate=evaluate)


def open_corpus(run: Run, data: Data, out: Path) -> ExampleCorpus:
    """The examples to learn from, of which every one has an answer."""
    if data.more:
        raise ConfigError("examples come from one root: join the files, and leave data.more empty")
    if data.root is None:
        return scene_examples(run.objective.task, run.seed, tokenizer=data.tokenizer)
    corpus = open_examples(data, run.objective.task, out / "index", split=data.split)
    corpus.require_answers()
    return corpus


def held_out_examples(run: Run, data: Data, out: Path, corpus: ExampleCorpus) -> ExampleCorpus | None:
    """What is measured on: the data's validation split, of embedded scenes other writers', or nothing."""
    task = run.objective.task
    if data.root is None:
        return scene_examples(task, run.seed, tokenizer=corpus.tokenizer, held_out=True)
    if data.split is None and "val" in splits(data.root, task):
        return open_examples(data, task, out / "index", split="val", tokenizer=corpus.tokenizer)
    return None


def fitting(run: Run, corpus: ExampleCorpus, known: answers.Known) -> Any:
    """The model's config with as many pictures and answers as the data; raises ConfigError when it says others."""
    shape, tokenizer = run.model, corpus.tokenizer
    if tokenizer.vocab > shape.vocab:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab} ids, the model {shape.vocab}: set model.vocab to at least that"
        )
    if shape.answers not in (0, len(known.names)):
        raise ConfigError(
            f"the data has {len(known.names)} answers, model.answers is {shape.answers}: set it to 0, which takes the "
            "number from the data"
        )
    changes: dict[str, Any] = {"answers": len(known.names)}
    if hasattr(shape, "pictures"):
        changes["pictures"] = corpus.pictures
    elif corpus.pictures:
        raise ConfigError(
            f"{run.recipe} tunes a model that sees pictures and texts apart, but the examples have {corpus.pictures} "
            "pictures each: take a joint encoder such as BEiT-3, VLMo or FLAVA"
        )
    return dataclasses.replace(shape, **changes)


def training_view(run: Run) -> View:
    """How pictures are shown while training."""
    data = run.data
    augment: RandAugment | None = PAIRED if run.objective.augment else None
    return View(
        px=run.model.image_px, scale=None if data.pair_scale == 1 else (data.pair_scale, 1.0), flip=data.flip / 2,
        interpolation=data.interpolation, augment=augment, jitter=data.jitter,
    )  # fmt: skip


def start_from(model: Any, folder: str) -> None:
    """Fill a model with the weights of a folder, positions interpolated to its pictures; heads that are new stay as
    they are.

    Raises ConfigError when anything but heads is missing there, or shapes differ.
    """
    source: Any = pretrained.load(folder).model
    if hasattr(source, "adapt") and type(source) is type(model):
        source.adapt(model.config)
    elif source.config.image_px != model.config.image_px:
        source.set_image_size(model.config.image_px)
    given, own = source.state_dict(), model.state_dict()
    fits = {name for name in own if name in given and own[name].shape == given[name].shape}
    lacking = [name for name in own if name not in fits and model.layer_of(name) <= model.layers]
    if lacking or type(source) is not type(model):
        absent, other = [n for n in lacking if n not in given], [n for n in lacking if n in given]
        raise ConfigError(
            f"{folder} holds a {type(source).__name__} that does not fit this {type(model).__name__}: not there "
            f"{absent[:5]}, of another shape {other[:5]}; set model.* to its shape"
        )
    model.load_state_dict({name: given[name] if name in fits else tensor for name, tensor in own.items()})
    new, left = (", ".join(n for n in names if n not in fits) or "none" for names in (own, given))
    CONSOLE.print(f"weights from {folder}; new: {new}; unused: {left}")


# ------------------------------------------------------------------------------------------------ runs of many systems


def quick(recipe: str, model: Any, task: Task, **changes: Any) -> Run:
    """Answering about embedded scenes by a micro model, in minutes on two CPU cores; sizes and rates are ours."""
    run = Run(
        recipe=recipe,
        model=model,
        objective=Answer(task=task, least=1),
        data=Data(
            examples=128, vocab=512, text_tokens=64, window=64, pair_scale=1.0, flip=False, jitter=0.0
        ),
        optim=Optim(lr=2e-3, matrices="muon"),
        schedule=Schedule(steps=600, warmup=60, final_lr=2e-5),
        parallel=Parallel(precision="fp32"),
        checkpoint=Checkpoint(every=200),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


VQA, NLVR2 = 658_111 - 6_000, 86_373
"""Questions of VQAv2's training and validation splits but for those of a thousand pictures (about six each), and
statements of NLVR2's training split.
"""


def tuned(
    run: Run, name: str, objective: Answer, *, px: int, batch: int, questions: int, epochs: int, warmup: float,
    drop_path: float, model: Mapping[str, Any] | None = None, **optim: Any,
) -> Run:  # fmt: skip
    """A published run that tunes ``run``'s model: epochs become steps, pictures are read at ``px``."""
    epoch = round(questions / batch)
    shape = dataclasses.replace(
        run.model, image_px=px // run.model.patch * run.model.patch, drop_path=drop_path, **(model or {})
    )
    return dataclasses.replace(
        run, recipe=name, objective=objective, model=shape,
        data=Data(
            examples=batch, vocab=shape.vocab, text_tokens=run.data.text_tokens, tokenizer=run.data.tokenizer,
            jitter=0.0, workers=8,
        ),
        optim=Optim(**{"betas": (0.9, 0.999), "eps": 1e-8, "clip": 0.0, **optim}),
        schedule=Schedule(steps=epochs * epoch, warmup=round(warmup * epoch), final_lr=1e-6),
        parallel=dataclasses.replace(run.parallel, micro=1),
    )  # fmt: skip
