"""Visual entailment: figures by class, and the file of predictions."""

from __future__ import annotations

import json

import pytest

from multiway.errors import DataError
from multiway.tasks.entailment import evaluate, predictions

TRUTH = ["entailment", "neutral", "neutral", "contradiction", "neutral"]


def test_figures_of_all_and_of_each_class() -> None:
    found = evaluate(["entailment", "neutral", "entailment", "neutral", "neutral"], TRUTH)
    assert found == {
        "accuracy": 0.6,
        "classes": {"contradiction": 0.0, "entailment": 1.0, "neutral": pytest.approx(2 / 3)},
        "examples": 5,
        "floor": {"answer": "neutral", "accuracy": 0.6},
    }
    with pytest.raises(DataError, match="no example has an answer"):
        evaluate([], [])


def test_the_file_of_predictions() -> None:
    lines = predictions(["4705552913.jpg#2r1n", "b"], TRUTH[:2]).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"pairID": "4705552913.jpg#2r1n", "label": "entailment"},
        {"pairID": "b", "label": "neutral"},
    ]
