"""Answering: what tasks share in which a model answers an example, one or two pictures and a text, or texts alone.

The model's head gives one number per answer: scores of classes of which one is right, of answers of which several are
more or less right, or a single value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.data.examples import Question
from multiway.errors import ConfigError, DataError, NumericsError
from multiway.tasks.needs import check
from multiway.types import Across, Batch, Objective, StepOutput, move

JOINT = frozenset({frozenset({"image", "text"})})
"""What a model must encode for examples with pictures: a picture with a text."""

TEXT = frozenset({frozenset({"text"})})
"""What it must encode for examples without: texts alone."""

Loss = Literal["classes", "scores", "value"]

KEYS: dict[Loss, str] = {"classes": "label", "scores": "score", "value": "value"}
"""Of what is right in a batch."""

Measure = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
"""Figures of predicted classes and the right ones, by their names."""


def require(model: Any, task: str, pictures: int) -> None:
    """Raise ConfigError, saying what would fit, unless a model can answer examples with so many pictures (0, 1, 2)."""
    check(model, JOINT if pictures else TEXT, task)
    name, shape = type(model).__name__, model.config
    if not getattr(shape, "answers", 0):
        raise ConfigError(
            f"{task} needs a head that answers, and this {name} has none: set model.answers to the number of answers, "
            f"or take a model that was tuned to {task}"
        )
    if (found := getattr(shape, "pictures", 0)) != pictures:
        raise ConfigError(
            f"an example of {task} shows {pictures} pictures, but this {name} answers examples with {found}: "
            f"set model.pictures to {pictures}"
        )


class Answering(Objective):
    """Tune a model to the answers of examples.

    ``model``: answers ``answer(plan, image=, text=, draws=) -> (B, answers)``; its config has ``answers`` > 0 and as
    many ``pictures`` as an example of the ``task`` shows. Batches are `ExampleCollate`'s.

    ``loss``: ``classes``: cross-entropy against ``label``, of whose probability ``smoothing`` is spread over all;
    ``scores``: binary cross-entropy of every answer against its ``score``, summed over the answers, which is the mean
    over entries times their number; ``value``: squared error against ``value``, for models with one answer.

    Term: ``answer``, per example; ``answer/accuracy``: how often the highest score is the right class's, or how right
    its answer is; not for values. Raises ConfigError, saying what would fit, when the model does not.

    Source: masked.md 5.4, 6.3, 9.4.
    """

    def __init__(self, model: Any, task: str, pictures: int, loss: Loss = "classes", smoothing: float = 0.0) -> None:
        super().__init__()
        require(model, task, pictures)
        if loss == "value" and model.config.answers != 1:
            raise ConfigError(f"{task} predicts one value, but model.answers is {model.config.answers}: set it to 1")
        if smoothing and loss != "classes":
            raise ConfigError(f"{task} has no classes whose probability could be smoothed: set smoothing to 0")
        self.model = model
        self.task, self.smoothing = task, smoothing
        self.loss: Loss = loss
        self.key = KEYS[loss]

    def init_weights(self) -> None:
        """Initialise the model."""
        self.model.init_weights()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Examples; raises DataError where they have no answers."""
        if self.key not in batch:
            raise DataError(f"{self.task} is tuned on answers, and these examples have none: choose a labelled split")
        return {"answer": len(batch[self.key])}

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Answer, compare."""
        plan, draws = batch["plan"], batch.get("drop_path")
        logits = self.model.answer(plan, image=batch.get("image"), text=batch["text"], draws=draws)
        with torch.autocast(logits.device.type, enabled=False):
            losses, hits = self.compare(logits.float(), batch[self.key])
        sums = {"answer": losses.sum().detach()}
        if hits is not None:
            sums["answer/accuracy"] = hits.sum()
        return StepOutput(losses.sum() / counts["answer"], sums)

    def compare(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss and hit of every example: (B, answers) -> float32 (B,), float32 (B,) in [0, 1] or None for values."""
        if self.loss == "value":
            return (logits[:, 0] - target).square(), None
        best = logits.detach().argmax(1)
        if self.loss == "scores":
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
            return losses, target.gather(1, best[:, None])[:, 0]
        losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=self.smoothing)
        return losses, (best == target).float()


class ClassTarget:
    """The right class of an example: ``{"label": int}``, ``{}`` for one without answer.

    ``labels``: names of the numbers that examples answer with; ``classes``: those that the model tells apart, in its
    order. Raises ConfigError for a name that is not among the classes, DataError for an example with several answers.
    """

    def __init__(self, labels: Sequence[str], classes: Sequence[str]) -> None:
        if unknown := sorted(set(labels) - set(classes)):
            raise ConfigError(
                f"the data answers with {_some(unknown)}, which the model does not tell apart: it knows "
                f"{_some(classes)}; tune a new one, or rename the answers"
            )
        self.numbers = [list(classes).index(name) for name in labels]

    def __call__(self, example: Question) -> dict[str, int]:
        """Of one example."""
        return {} if (answer := _only(example)) is None else {"label": self.numbers[answer]}


class ValueTarget:
    """The number that an example is answered with: ``{"value": float}``, ``{}`` for one without answer.

    ``labels`` as for `ClassTarget`. Raises DataError for one that is no number, or an example with several.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.values = [value_of(name) for name in labels]

    def __call__(self, example: Question) -> dict[str, float]:
        """Of one example."""
        return {} if (answer := _only(example)) is None else {"value": self.values[answer]}


def value_of(name: str) -> float:
    """An answer as a finite number; raises DataError where it is none."""
    try:
        value = float(name)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(f"the data answers with {name!r}, expected a number: is this a task with classes?")
    return value


@torch.inference_mode()
def predict(model: Any, batches: Iterable[Batch]) -> np.ndarray:
    """What a model's head says of all examples of some batches: float32 (N, answers), in their order."""
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        own = move(batch, device)
        found.append(model.answer(own["plan"], image=own.get("image"), text=own["text"]).float().cpu())
    return torch.cat(found).numpy()


def chosen(logits: np.ndarray, names: Sequence[str]) -> list[str]:
    """Name of the highest score of every example: (N, answers) -> N names.

    Raises NumericsError when a score is not finite, ConfigError when there are not as many names as answers.
    """
    if not np.isfinite(logits).all():
        raise NumericsError("scores of answers are not finite: the model has diverged")
    if logits.shape[1] != len(names):
        raise ConfigError(f"the model scores {logits.shape[1]} answers, but {len(names)} have names: {_some(names)}")
    return [str(names[best]) for best in logits.argmax(1)]


def accuracy(predicted: Sequence[str], truth: Sequence[str]) -> float:
    """Share of examples that are right, in [0, 1]."""
    return float(np.mean([own == right for own, right in zip(predicted, truth, strict=True)]))


def figures(predicted: Sequence[str], truth: Sequence[str], measure: Measure) -> dict[str, Any]:
    """What ``measure`` says of predicted classes, and of always saying the most frequent one.

    Returns ``{..., "examples": N, "floor": {"answer": ..., ...}}``. Raises DataError when there is no example.
    """
    floor = most_frequent(truth)
    return {
        **measure(predicted, truth),
        "examples": len(truth),
        "floor": {"answer": floor, **measure([floor] * len(truth), truth)},
    }


def most_frequent(truth: Sequence[str]) -> str:
    """The answer that most examples have, of several the one that came first; raises DataError when there is none."""
    if not truth:
        raise DataError("no example has an answer: figures need a labelled split")
    return Counter(truth).most_common(1)[0][0]


def _only(example: Question) -> int | None:
    """The answer of an example, None without."""
    if len(example.answers) > 1:
        raise DataError(f"example {example.record} has {len(example.answers)} answers: expected one class or value")
    return next(iter(example.answers), None)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
