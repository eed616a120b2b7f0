"""Text classification: classes of one text or two, or how alike two are, as the sets of GLUE ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from multiway.errors import ConfigError, DataError
from multiway.metrics.agreement import f1, matthews, pearson, spearman
from multiway.tasks.answering import TEXT, accuracy, figures

NEEDS = TEXT
"""What a model must encode: texts alone."""

POSITIVE = "1"
"""Class whose F1 is told."""

BINARY, ENTAILS = ("0", "1"), ("entailment", "not_entailment")
INFERENCE = ("contradiction", "entailment", "neutral")


class Glue(NamedTuple):
    """A set of GLUE: its file on the leaderboard, its figures, and its classes; none = a value is predicted."""

    file: str
    measures: tuple[str, ...]
    classes: tuple[str, ...] = ()


SETS = {
    "cola": Glue("CoLA.tsv", ("matthews", "accuracy"), BINARY),
    "sst2": Glue("SST-2.tsv", ("accuracy",), BINARY),
    "mrpc": Glue("MRPC.tsv", ("accuracy", "f1"), BINARY),
    "stsb": Glue("STS-B.tsv", ("pearson", "spearman")),
    "qqp": Glue("QQP.tsv", ("accuracy", "f1"), BINARY),
    "mnlimatched": Glue("MNLI-m.tsv", ("accuracy",), INFERENCE),
    "mnlimismatched": Glue("MNLI-mm.tsv", ("accuracy",), INFERENCE),
    "qnli": Glue("QNLI.tsv", ("accuracy",), ENTAILS),
    "rte": Glue("RTE.tsv", ("accuracy",), ENTAILS),
    "wnli": Glue("WNLI.tsv", ("accuracy",), BINARY),
    "ax": Glue("AX.tsv", ("matthews", "accuracy"), INFERENCE),
}
"""By name in small letters and digits; MNLI's two test sets apart. Source: Wang et al. 2018 (arXiv 1804.07461)."""

MEASURES = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": lambda predicted, truth: f1(np.equal(predicted, POSITIVE), np.equal(truth, POSITIVE)),
}


def glue(name: str | None) -> Glue | None:
    """The set of GLUE of that name, however it is written (``SST-2``, ``sst2``, ``MNLI-mm``, ``mnli_mismatched``)."""
    plain = "".join(sign for sign in (name or "").lower() if sign.isalnum())
    return SETS.get({"mnlim": "mnlimatched", "mnlimm": "mnlimismatched"}.get(plain, plain))


def evaluate(predicted: Sequence[str], truth: Sequence[str], name: str | None = None) -> dict[str, Any]:
    """Figures of predicted classes, those of a set of GLUE if it is one, else accuracy.

    ``name``: of the set. Accuracy and F1 (of class ``1``) in [0, 1], Matthews correlation in [-1, 1], 0 when only one
    class is predicted. Returns ``{..., "examples", "floor": {"answer", ...}}``, the floor being the most frequent
    class. Raises DataError when there is no example, ConfigError for a set that has no classes.
    """
    found = glue(name)
    if found and not found.classes:
        raise ConfigError(f"{name} has no classes but values: set model.answers to 1, and measure them as such")
    measures = found.measures if found else ("accuracy",)
    return figures(predicted, truth, lambda x, y: {measure: MEASURES[measure](x, y) for measure in measures})


def evaluate_values(predicted: Sequence[float] | np.ndarray, truth: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Pearson and Spearman correlation of predicted values, in [-1, 1], 0 when all are the same.

    Returns ``{"pearson", "spearman", "examples", "floor": {"answer", "pearson", "spearman"}}``; the floor always says
    the mean. Raises DataError when there is no example, NumericsError when a value is not finite.
    """
    if not len(truth):
        raise DataError("no example has a value: figures need a labelled split")
    return {
        "pearson": pearson(predicted, truth),
        "spearman": spearman(predicted, truth),
        "examples": len(truth),
        "floor": {"answer": float(np.mean(truth)), "pearson": 0.0, "spearman": 0.0},
    }


def predictions(keys: Sequence[str], predicted: Sequence[str | float], name: str | None = None) -> str:
    """The file that GLUE's leaderboard reads: ``index TAB prediction`` below a header; `Glue.file` is its name.

    ``predicted``: classes by the names of GLUE's own files, or values. Raises ConfigError for other names.
    """
    found = glue(name)
    known = set(found.classes if found else ())
    if known and (unknown := sorted({str(own) for own in predicted} - known)):
        raise ConfigError(
            f"{name}: the leaderboard knows the classes {', '.join(sorted(known))}, the model says "
            f"{', '.join(unknown[:5])}: tune it on classes named as in GLUE's own files"
        )
    rows = ((key, own if isinstance(own, str) else f"{own:.5f}") for key, own in zip(keys, predicted, strict=True))
    return "index\tprediction\n" + "".join(f"{key}\t{own}\n" for key, own in rows)
