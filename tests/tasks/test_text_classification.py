"""Text classification: which figures each set of GLUE asks for, and its leaderboard's files."""

from __future__ import annotations

import numpy as np
import pytest

from multiway.errors import ConfigError, DataError, NumericsError
from multiway.tasks.text_classification import SETS, evaluate, evaluate_values, glue, predictions

FILES = "AX CoLA MNLI-m MNLI-mm MRPC QNLI QQP RTE SST-2 STS-B WNLI"
TRUTH, SAID = list("11110010"), list("11010110")


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (("SST-2", "sst2", "SST2", "sst_2"), "SST-2.tsv"),
        (("MNLI-m", "mnli_matched"), "MNLI-m.tsv"),
        (("MNLI-mm", "mnli-mismatched", "MNLI_mismatched"), "MNLI-mm.tsv"),
        (("STS-B", "stsb"), "STS-B.tsv"),
    ],
)
def test_sets_go_by_any_spelling(names: tuple[str, ...], file: str) -> None:
    for name in names:
        found = glue(name)
        assert found is not None and found.file == file
    assert glue(None) is None and glue("") is None and glue("trec") is None and glue("mnli") is None


def test_all_sets_are_there() -> None:
    assert sorted(own.file for own in SETS.values()) == [f"{name}.tsv" for name in FILES.split()]
    assert [name for name, own in SETS.items() if not own.classes] == ["stsb"]


def test_figures_are_those_of_the_set() -> None:
    """TRUTH has five ones; SAID finds four of them, and one more: (4 * 2 - 1 * 1) / (5 * 3), precision = recall."""
    right = {"accuracy": 0.75}
    assert evaluate(SAID, TRUTH) == {**right, "examples": 8, "floor": {"answer": "1", "accuracy": 0.625}}
    assert evaluate(SAID, TRUTH, "SST-2") == evaluate(SAID, TRUTH, "mine") == evaluate(SAID, TRUTH)
    cola = evaluate(SAID, TRUTH, "CoLA")
    assert cola == {
        **right, "matthews": pytest.approx(7 / 15), "examples": 8,
        "floor": {"answer": "1", "matthews": 0.0, "accuracy": 0.625},
    }  # fmt: skip
    assert evaluate(SAID, TRUTH, "QQP") == {
        **right, "f1": pytest.approx(0.8), "examples": 8,
        "floor": {"answer": "1", "accuracy": 0.625, "f1": pytest.approx(2 * 0.625 / 1.625)},
    }  # fmt: skip
    assert evaluate(["entailment"], ["neutral"], "AX")["matthews"] == 0.0
    with pytest.raises(DataError, match="no example has an answer"):
        evaluate([], [], "cola")
    with pytest.raises(ConfigError, match="stsb has no classes but values"):
        evaluate(["1"], ["1"], "stsb")


def test_figures_of_values() -> None:
    found = evaluate_values([1.0, 2.0, 4.0], np.array([0.0, 2.5, 5.0]))
    assert found == {
        "pearson": pytest.approx(np.corrcoef([1, 2, 4], [0, 2.5, 5])[0, 1]),
        "spearman": 1.0,
        "examples": 3,
        "floor": {"answer": 2.5, "pearson": 0.0, "spearman": 0.0},
    }
    constant = evaluate_values([2.0] * 3, [0.0, 2.5, 5.0])
    assert constant["pearson"] == constant["spearman"] == 0.0
    with pytest.raises(DataError, match="no example has a value"):
        evaluate_values([], [])
    with pytest.raises(NumericsError, match="diverged"):
        evaluate_values([float("nan")], [1.0])


def test_the_files_of_predictions() -> None:
    assert predictions(["0", "1"], ["1", "0"], "CoLA") == "index\tprediction\n0\t1\n1\t0\n"
    assert predictions(["0"], ["not_entailment"], "RTE") == "index\tprediction\n0\tnot_entailment\n"
    assert predictions(["7"], [4.25], "STS-B") == "index\tprediction\n7\t4.25000\n"
    assert predictions(["a"], ["funny"]) == "index\tprediction\na\tfunny\n"
    with pytest.raises(ConfigError, match="knows the classes entailment, not_entailment, the model says 0: tune it"):
        predictions(["0"], ["0"], "qnli")
