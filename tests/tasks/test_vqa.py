"""Visual question answering: the vocabulary, what is learnt, the figures and the file of predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from multiway.data.examples import Question
from multiway.errors import DataError
from multiway.tasks.vqa import ScoreTarget, evaluate, predictions, vocabulary


def asked(*answers: int) -> Question:
    return Question(images=(), text=np.zeros(1, np.int32), answers=answers, record=0, rng=np.random.default_rng(0))


def test_the_vocabulary_is_of_frequent_majorities_in_order_of_appearance() -> None:
    answers = [
        ["rare"],
        ["Two", "2", "three"],
        [],
        ["yes"],
        ["the yes", "no", "no"],
        ["2."],
        ["no", "Yes", "yes"],
        ["no"],
    ]
    assert vocabulary(answers, least=2) == ["2", "yes", "no"]
    assert vocabulary(answers, least=1) == ["rare", "2", "yes", "no"]
    assert vocabulary([["no"]] * 9 + [["yes"]] * 8) == ["no"]
    with pytest.raises(DataError, match="most frequent one of 3 questions .there are 7"):
        vocabulary(answers, least=3)


def test_scores_grow_with_the_people_who_say_it() -> None:
    labels = ["yes", "The Yes.", "2", "two", "unknown"]
    targets = ScoreTarget(labels, ["2", "yes", "no"])
    found = targets(asked(0, 0, 1, 2, 3, 4, 4, 4, 4, 4))["score"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.6, 0.9, 0])
    np.testing.assert_allclose(targets(asked(*[0] * 6, *[2] * 3, 4))["score"], [0.9, 1, 0])
    np.testing.assert_allclose(targets(asked(3))["score"], [1, 0, 0])  # one answer alone is right
    np.testing.assert_allclose(targets(asked(4))["score"], [0, 0, 0])
    assert targets(asked()) == {}


def test_figures_by_type_beside_the_most_frequent_answer() -> None:
    answers = [["yes"] * 10, ["No"] * 2 + ["yes"] * 8, ["two"] * 9 + ["2"], ["red"] * 4 + ["pink"] * 6]
    found = evaluate(["yes", "no", "3", "Red."], answers)
    assert found == {
        "accuracy": pytest.approx((1 + 0.6 + 0 + 1) / 4),
        "types": {"yes/no": pytest.approx(0.8), "number": 0.0, "other": 1.0},
        "examples": 4,
        "floor": {"answer": "yes", "accuracy": pytest.approx(0.5)},
    }


def test_of_single_answers_the_figure_is_plain_accuracy() -> None:
    found = evaluate(["a cat", "dog", "2", "blue"], [["Cat"], ["bird"], ["two"], ["blue"]])
    assert found["accuracy"] == 0.75 and found["types"] == {"number": 1.0, "other": pytest.approx(2 / 3)}
    with pytest.raises(DataError, match="no example has an answer"):
        evaluate([], [])


def test_the_file_of_predictions() -> None:
    text = predictions(["262148000", "q-7"], ['na\u00efve "x"', "2"])
    assert json.loads(text) == [
        {"question_id": 262148000, "answer": "na\u00efve \"x\""},
        {"question_id": "q-7", "answer": "2"},
    ]  # fmt: skip
