"""Visual reasoning: what counts as one sentence, and the figures and files of both official scorers."""

from __future__ import annotations

import pytest

from multiway.errors import DataError
from multiway.tasks.nlvr2 import evaluate, predictions, sentence

PAIRS = ["dev-850-0-0", "dev-850-1-0", "dev-850-0-1", "dev-7-3-0"]
PICTURES = ["dev-1572-0-0.png", "dev-1572-0-5.png", "dev-1572-3-2.png", "dev-15-0-0.png"]


def test_a_sentence_is_shown_with_several_pairs_or_pictures() -> None:
    assert [sentence(key) for key in PAIRS] == ["dev-850-0", "dev-850-0", "dev-850-1", "dev-7-0"]
    assert [sentence(key) for key in PICTURES] == ["dev-1572", "dev-1572", "dev-1572", "dev-15"]
    assert [sentence(key) for key in ("17", "dev-1-2", "a-b-c-d", "dev-850-0-0.jpg")] == [None] * 4


def test_a_sentence_is_consistent_when_all_of_it_is_right() -> None:
    truth = ["True", "False", "True", "True"]
    assert evaluate(["True", "True", "True", "False"], truth, PAIRS) == {
        "accuracy": 0.5,
        "consistency": pytest.approx(1 / 3),
        "examples": 4,
        "floor": {"answer": "true", "accuracy": 0.75, "consistency": pytest.approx(2 / 3)},
    }
    found = evaluate(["true", "true", "false", "true"], ["True", "true", "true", "TRUE"], PICTURES)
    assert (found["accuracy"], found["consistency"], found["floor"]["accuracy"]) == (0.75, 0.5, 1.0)


def test_other_keys_have_no_consistency() -> None:
    found = evaluate(["true", "false"], ["true", "true"], ["1", "2"])
    assert found == {"accuracy": 0.5, "examples": 2, "floor": {"answer": "true", "accuracy": 1.0}}
    with pytest.raises(DataError, match="no example"):
        evaluate([], [], [])


def test_the_files_of_predictions() -> None:
    assert predictions(PAIRS[:2], ["true", "False"]) == "dev-850-0-0,True\ndev-850-1-0,False\n"
    assert predictions(PICTURES[:2], ["True", "false"]) == "dev-1572-0-0.png,true\ndev-1572-0-5.png,false\n"
