"""Accuracy of visual question answering: the definition written out anew, and the normal form, rule by rule."""

from __future__ import annotations

import itertools

import pytest

from multiway.metrics.vqa import CONTRACTIONS, accuracy, answer_type, majority, normalise, score


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("  two\n dogs\t", "2 dogs"),
        ("None", "0"),
        ("ten of the eleven", "10 of eleven"),
        ("The a an", ""),
        ("a man, a plan", "man plan"),  # beside a space a sign goes without leaving one
        ("black/white", "black white"),
        ("black/white / grey", "blackwhite grey"),  # as this does, everywhere
        ("red -blue-green", "red bluegreen"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("1,000 black/white", "1000 blackwhite"),  # and a comma between digits takes all signs with it
        ("2:50 p.m.", "2:50 pm"),
        ("3.5 in.", "3.5 in"),
        ("no. 5", "no 5"),
        (".5", ".5"),
        ("girl's", "girl's"),
        ("What?!", "what"),
        ("5%", "5%"),
        ("dont", "don't"),
        ("I dont think so, Im sorry", "i don't think so im sorry"),  # the table has I'm in upper case only
        ("yall'd've", "y'all'd've"),
        ("y'alldve", "y'alldve"),  # two are missing
        ("oclock twas", "o'clock 'twas"),
        ("somebody'd", "somebodyd"),
        ("wed", "wed"),
        ("were ill", "were ill"),
        ("\u4e24\u53ea\u72d7", "\u4e24\u53ea\u72d7"),
    ],
)
def test_the_normal_form(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_contractions_lack_one_apostrophe_each() -> None:
    assert len(CONTRACTIONS) == 114
    for short, whole in CONTRACTIONS.items():
        if short != "somebody'd":
            assert any(whole[:i] + whole[i + 1 :] == short for i, sign in enumerate(whole) if sign == "'")
            assert whole not in CONTRACTIONS


def left_out(predicted: str, answers: list[str]) -> float:
    """The definition: each of the people is left out once, three of the others make a full point."""
    subsets = itertools.combinations(answers, len(answers) - 1)
    return sum(min(1, subset.count(predicted) / 3) for subset in subsets) / len(answers)


@pytest.mark.parametrize("people", [4, 5, 10])
def test_the_mean_over_all_but_one(people: int) -> None:
    for right in range(people + 1):
        answers = ["red"] * right + [f"c{i}" for i in range(people - right)]
        assert (
            accuracy("red", answers) == pytest.approx(left_out("red", answers)) == pytest.approx(score(right, people))
        )


def test_ten_people() -> None:
    """The soft scores that answers are learnt by (masked.md 6.3)."""
    assert [score(n, 10) for n in range(11)] == pytest.approx([0, 0.3, 0.6, 0.9] + [1.0] * 7)


def test_fewer_people_all_have_to_agree() -> None:
    assert [score(n, 1) for n in range(2)] == [0, 1]
    assert [score(n, 2) for n in range(3)] == [0, 0.5, 1]
    assert [score(n, 3) for n in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_only_where_people_differ_are_answers_normalised() -> None:
    assert accuracy("2", ["Two"] * 9 + ["2"]) == 1
    assert accuracy("Two.", ["two"] * 5 + ["the 2"] * 5) == 1
    assert accuracy("2", ["two"] * 10) == 0  # as the official evaluation has it
    assert accuracy(" two\n", ["two", "two "] * 5) == 1
    assert accuracy("Two.", ["2"]) == 1  # one answer alone is always normalised


def test_the_most_frequent_answer_and_its_type() -> None:
    assert majority(["cat", "Dog", "the dog", "cat?", "bird"]) == "cat"
    assert majority(["b", "a", "dog", "dog."]) == "dog"
    assert [answer_type([x]) for x in ("Yes", "no.", "two", "3.5", "1,000", "2:50", "2 dogs", "yes and no")] == [
        "yes/no", "yes/no", "number", "number", "number", "other", "other", "other",
    ]  # fmt: skip
