"""Tuning to answers, on a model small enough to write its losses out anew."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from multiway.data.examples import ExampleCollate, Question
from multiway.errors import ConfigError, DataError, NumericsError
from multiway.plan import Plan
from multiway.systems.clip import CLIP
from multiway.tasks.answering import (
    Answering,
    ClassTarget,
    Loss,
    ValueTarget,
    accuracy,
    chosen,
    figures,
    predict,
    require,
    value_of,
)
from multiway.types import Batch
from tests.contracts.toys import WORDS

ANSWERS, PX, DIM = 5, 4, 8
BOTH = frozenset({frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})})


class Reader(nn.Module):
    """Reads the first word of a text, and the means of the colours of its pictures."""

    accepts = BOTH

    def __init__(self, answers: int = ANSWERS, pictures: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(answers=answers, pictures=pictures)
        self.words = nn.Embedding(WORDS.stop, DIM)
        self.head = nn.Linear(DIM + 3 * pictures, max(1, answers))
        self.init_weights()

    def init_weights(self) -> None:
        torch.manual_seed(0)
        for x in self.parameters():
            nn.init.normal_(x)

    def answer(self, plan: Plan, *, image: Tensor | None = None, text: Tensor, draws: Tensor | None = None) -> Tensor:
        self.draws, pictures = draws, self.config.pictures
        first = text[plan.starts["text"] - plan.extent("text")[0] + 1][:: max(1, pictures)]
        read = [self.words(first)]
        if pictures:
            assert image is not None
            read.append((image.float() / 255).mean((2, 3)).view(-1, 3 * pictures))
        return self.head(torch.cat(read, dim=1))


def questions(count: int, pictures: int = 1) -> list[Question]:
    found = []
    for i in range(count):
        rng = np.random.default_rng(i)
        images = tuple(torch.from_numpy(rng.integers(256, size=(3, PX, PX), dtype=np.uint8)) for _ in range(pictures))
        text = rng.integers(WORDS.first, WORDS.stop, rng.integers(1, 6))
        found.append(Question(images=images, text=text, answers=(i % ANSWERS,), record=i, rng=rng))
    return found


def target(loss: Loss, question: Question) -> dict[str, Any]:
    if loss == "classes":
        return {"label": question.answers[0]}
    if loss == "value":
        return {"value": question.answers[0] / 2}
    return {"score": np.random.default_rng(question.record).random(ANSWERS).astype(np.float32)}


def batch(some: list[Question], loss: Loss | None = None, pictures: int = 1, branches: int = 0) -> Batch:
    targets = {"targets": lambda question: target(loss, question)} if loss else {}
    grid = (1, 1) if pictures else None
    return ExampleCollate(words=WORDS, grid=grid, pictures=pictures, branches=branches, **targets)({"example": some})


def objective_of(loss: Loss = "classes", pictures: int = 1, **settings: Any) -> Answering:
    model = Reader(1 if loss == "value" else ANSWERS, pictures)
    return Answering(model, "a task", pictures, loss, **settings)


# ------------------------------------------------------------------------------------------------------------- losses


def softened(logits: list[float], label: int, smoothing: float) -> float:
    """Cross-entropy against a class that lost a part of its probability to all."""
    total = math.log(sum(map(math.exp, logits)))
    wanted = [smoothing / len(logits) + (1 - smoothing) * (i == label) for i in range(len(logits))]
    return -sum(p * (x - total) for p, x in zip(wanted, logits, strict=True))


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes(pictures: int, smoothing: float) -> None:
    objective, given = (
        objective_of("classes", pictures, smoothing=smoothing),
        batch(questions(6, pictures), "classes", pictures),
    )
    assert objective.counts(given) == {"answer": 6} and objective.splittable
    found = objective(given, objective.counts(given))
    logits, label = predict(objective.model, [given]).tolist(), given["label"].tolist()
    want = sum(softened(x, y, smoothing) for x, y in zip(logits, label, strict=True))
    assert found.loss.item() == pytest.approx(want / 6, rel=1e-5)
    assert found.sums["answer"].item() == pytest.approx(want, rel=1e-5)
    assert found.sums["answer/accuracy"].item() == sum(np.argmax(logits, 1) == label)


def test_scores_are_mean_entropies_times_the_number_of_answers() -> None:
    objective, given = objective_of("scores"), batch(questions(6), "scores")
    found = objective(given, objective.counts(given))
    logits, score = predict(objective.model, [given]).astype(float), given["score"].numpy()
    p = 1 / (1 + np.exp(-logits))
    entropies = -(score * np.log(p) + (1 - score) * np.log1p(-p))
    assert found.loss.item() == pytest.approx(entropies.mean() * ANSWERS, rel=1e-5)
    assert found.sums["answer/accuracy"].item() == pytest.approx(score[np.arange(6), logits.argmax(1)].sum())


def test_values() -> None:
    objective, given = objective_of("value", 0), batch(questions(6, 0), "value", 0)
    found = objective(given, objective.counts(given))
    errors = predict(objective.model, [given])[:, 0] - given["value"].numpy()
    assert found.loss.item() == pytest.approx((errors**2).mean(), rel=1e-5)
    assert set(found.sums) == {"answer"}


@pytest.mark.parametrize("loss", ["classes", "scores", "value"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_loss_and_gradients_do_not_depend_on_how_a_step_is_split(loss: Loss, pictures: int) -> None:
    some = questions(7, pictures)
    found = []
    for parts in ([some], [some[:3], some[3:]], [some[:1], some[1:2], some[2:6], some[6:]]):
        objective = objective_of(loss, pictures)
        batches = [batch(part, loss, pictures) for part in parts]
        counts = {"answer": sum(objective.counts(own)["answer"] for own in batches)}
        assert counts == {"answer": 7}
        total = torch.stack([objective(own, counts).loss for own in batches]).sum()
        total.backward()
        gradients = [x.grad for x in objective.parameters()]
        assert all(x is not None and x.abs().sum() > 0 for x in gradients)
        found.append((total.detach(), gradients))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("loss", ["classes", "scores", "value"])
def test_losses_are_float32_under_autocast(loss: Loss) -> None:
    objective, given = objective_of(loss), batch(questions(6), loss)
    exact = objective(given, {"answer": 6}).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(given, {"answer": 6}).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=0)


def test_draws_of_stochastic_depth_reach_the_model() -> None:
    objective = objective_of()
    for branches in (0, 4):
        given = batch(questions(3), "classes", branches=branches)
        objective(given, objective.counts(given))
        assert objective.model.draws is given.get("drop_path")
        assert (objective.model.draws is None) == (branches == 0)


def test_training_needs_answers() -> None:
    with pytest.raises(DataError, match="a task is tuned on answers, and these examples have none"):
        objective_of().counts(batch(questions(2)))


# --------------------------------------------------------------------------------------------------------- wrong pairs


def test_a_model_that_does_not_fit_is_refused_in_words() -> None:
    model = Reader()
    model.accepts = CLIP.accepts
    with pytest.raises(
        ConfigError, match="nlvr2 needs a model that encodes image with text; Reader encodes image alone"
    ):
        Answering(model, "nlvr2", 2)
    with pytest.raises(ConfigError, match="needs a head that answers, .* set model.answers"):
        Answering(Reader(answers=0), "vqa", 1)
    with pytest.raises(ConfigError, match="an example of nlvr2 shows 2 pictures, .* with 1: set model.pictures to 2"):
        Answering(Reader(), "nlvr2", 2)
    with pytest.raises(ConfigError, match="predicts one value, but model.answers is 5: set it to 1"):
        Answering(Reader(), "sts", 1, "value")
    with pytest.raises(ConfigError, match="no classes whose probability could be smoothed"):
        Answering(Reader(), "vqa", 1, "scores", smoothing=0.1)


def test_texts_alone_need_no_joint_encoder() -> None:
    model = Reader(pictures=0)
    model.accepts, model.config = CLIP.accepts, SimpleNamespace(answers=2)  # without a word about pictures
    require(model, "text_classification", 0)
    model.accepts = frozenset({frozenset({"image"})})
    with pytest.raises(ConfigError, match="text_classification needs a model that encodes text alone"):
        require(model, "text_classification", 0)


# ------------------------------------------------------------------------------------------------------------- targets


def asked(*answers: int) -> Question:
    return Question(images=(), text=np.zeros(1, np.int32), answers=answers, record=17, rng=np.random.default_rng(0))


def test_classes_are_numbered_as_the_model_does() -> None:
    targets = pickle.loads(pickle.dumps(ClassTarget(["dog", "cat"], ("bird", "cat", "dog"))))  # as loader workers do
    assert [targets(asked(0)), targets(asked(1)), targets(asked())] == [{"label": 2}, {"label": 1}, {}]
    with pytest.raises(DataError, match="example 17 has 2 answers"):
        targets(asked(0, 1))
    with pytest.raises(ConfigError, match="'emu', which the model does not tell apart: it knows 'bird', 'cat'"):
        ClassTarget(["cat", "emu"], ("bird", "cat"))


def test_values_are_numbers() -> None:
    targets = ValueTarget(["3.25", "5"])
    assert [targets(asked(0)), targets(asked(1)), targets(asked())] == [{"value": 3.25}, {"value": 5.0}, {}]
    with pytest.raises(DataError, match="example 17 has 2 answers"):
        targets(asked(0, 1))
    for name in ("alike", "nan", "inf", ""):
        with pytest.raises(DataError, match="expected a number"):
            value_of(name)


def test_targets_become_a_batch() -> None:
    own = ExampleCollate(words=WORDS, targets=ClassTarget(list("edcba"), "abcde"))({"example": questions(6, 0)})
    assert own["label"].tolist() == [4, 3, 2, 1, 0, 4] and own["label"].dtype == torch.int64


# ------------------------------------------------------------------------------------------------------------- figures


def test_predictions_are_those_of_single_examples() -> None:
    model, some = Reader(pictures=2), questions(5, 2)
    found = predict(model, [batch(some[:2], pictures=2), batch(some[2:], "classes", pictures=2)])
    assert found.dtype == np.float32 and found.shape == (5, ANSWERS)
    for row, question in zip(found, some, strict=True):
        np.testing.assert_allclose(predict(model, [batch([question], pictures=2)])[0], row, rtol=1e-5)


def test_the_highest_score_is_chosen_by_name() -> None:
    assert chosen(np.array([[0.1, 0.2, -1], [3, 2, 1]]), ["a", "b", "c"]) == ["b", "a"]
    with pytest.raises(NumericsError, match="diverged"):
        chosen(np.array([[np.nan, 1]]), ["a", "b"])
    with pytest.raises(ConfigError, match="scores 2 answers, but 6 have names: 'a', 'b', 'c', 'd', 'e' and 1 more"):
        chosen(np.zeros((1, 2)), list("abcdef"))


def test_figures_stand_beside_the_most_frequent_answer() -> None:
    found = figures(list("abca"), list("abbc"), lambda x, y: {"accuracy": accuracy(x, y)})
    assert found == {"accuracy": 0.5, "examples": 4, "floor": {"answer": "b", "accuracy": 0.5}}
    with pytest.raises(DataError, match="no example has an answer"):
        figures([], [], lambda x, y: {})
