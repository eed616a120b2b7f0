"""Tuning to classes, and its figures, on a model whose scores are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.data.collate import Sample
from multiway.data.pictures import LabelCollate
from multiway.errors import ConfigError, NumericsError
from multiway.tasks.image_classification import ImageClassification, evaluate
from multiway.types import Batch

CLASSES, PX = 5, 8


class Scorer(nn.Module):
    """Scores pictures by a linear map of their pixels in [0, 1]; remembers what it was given."""

    accepts = frozenset({frozenset({"image"})})

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(classes=classes)
        self.linear = nn.Linear(3 * PX * PX, CLASSES)

    def pixels(self, image: Tensor) -> Tensor:
        return image / 255

    def classify(self, image: Tensor, draws: Tensor | None = None) -> Tensor:
        self.given, self.draws = image, draws
        return self.linear(image.float().flatten(1))


def samples(count: int = 6) -> list[Sample]:
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, PX, PX), dtype=np.uint8))
    return [
        Sample(image=images[i], label=i % CLASSES, record=i, rng=np.random.default_rng(i)) for i in range(count)
    ]  # fmt: skip


def batch(**settings: float) -> Batch:
    return LabelCollate(**settings)({"image": samples()})


def test_the_loss_is_the_mean_cross_entropy_against_smoothed_classes() -> None:
    objective, given = ImageClassification(Scorer(), smoothing=0.1), batch()
    output = objective(given, objective.counts(given))
    logits = objective.model.linear(given["image"].flatten(1) / 255)
    want = F.cross_entropy(logits, given["label"], label_smoothing=0.1)
    torch.testing.assert_close(output.loss, want)
    torch.testing.assert_close(output.sums["label"], 6 * want)
    assert output.sums["label/accuracy"].item() == (logits.argmax(1) == given["label"]).sum().item()
    assert objective.counts(given) == {"label": 6} and objective.splittable
    halves = [LabelCollate()({"image": samples()[i : i + 3]}) for i in (0, 3)]
    torch.testing.assert_close(sum(objective(half, {"label": 6}).loss for half in halves), want)


def test_pictures_are_normalised_then_erased_then_mixed() -> None:
    objective, given = ImageClassification(Scorer()), batch(erase=1.0, mixup=0.8)
    output = objective(given, objective.counts(given))
    erased, start = given["image"] / 255, 0
    for i, (top, left, height, width) in enumerate(given["erase_box"].tolist()):
        size = 3 * height * width
        noise = given["erase_noise"][start : start + size].view(3, height, width)
        erased[i, :, top : top + height, left : left + width] = noise
        start += size
    assert start == len(given["erase_noise"]) > 0
    share = given["mix_share"][:, None, None, None]
    mixed = share * erased + (1 - share) * erased[[1, 0, 3, 2, 5, 4]]
    torch.testing.assert_close(objective.model.given, mixed)
    own, other = (F.one_hot(y, CLASSES).float() for y in (given["label"], given["label"][[1, 0, 3, 2, 5, 4]]))
    targets = share[:, :, 0, 0] * own + (1 - share[:, :, 0, 0]) * other
    torch.testing.assert_close(output.loss, F.cross_entropy(objective.model.linear(mixed.flatten(1)), targets))


def test_draws_of_stochastic_depth_reach_the_model() -> None:
    objective = ImageClassification(Scorer())
    for branches in (0, 4):
        given = batch(branches=branches)
        objective(given, objective.counts(given))
        assert objective.model.draws is given.get("drop_path")
        assert (objective.model.draws is None) == (branches == 0)


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(ConfigError, match="Scorer has no classifier: set model.classes"):
        ImageClassification(Scorer(classes=0))
    model = Scorer()
    model.accepts = frozenset({frozenset({"text"})})
    with pytest.raises(ConfigError, match="image classification needs a model that encodes image alone"):
        ImageClassification(model)


# --- figures ----------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """The first pixels of a picture are its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def classify(self, image: Tensor) -> Tensor:
        return image[:, 0, 0, :CLASSES].float()


def shown(*scores: list[int]) -> Tensor:
    image = torch.zeros(len(scores), 3, PX, PX, dtype=torch.uint8)
    image[:, 0, 0, :CLASSES] = torch.tensor(scores, dtype=torch.uint8)
    return image


def test_figures_are_of_all_batches_together() -> None:
    found = evaluate(Fixed(), [(shown([9, 1, 2, 3, 4], [0, 7, 1, 1, 1]), torch.tensor([0, 0])), (shown([2] * 5), [4])])
    scores = torch.tensor([[9.0, 1, 2, 3, 4], [0, 7, 1, 1, 1], [2, 2, 2, 2, 2]])
    assert found == {
        "top1": pytest.approx((1 + 0 + 1 / 5) / 3),  # a tie is won as often as by chance
        "top5": 1.0,
        "loss": pytest.approx(F.cross_entropy(scores, torch.tensor([0, 0, 4])).item()),
        "pictures": 3,
        "chance": 1 / 5,
    }


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="class 7 among the pictures, but the model has 5"):
        evaluate(Fixed(), [(shown([1] * 5), torch.tensor([7]))])
    model = Scorer()
    nn.init.constant_(model.linear.bias, float("nan"))
    with pytest.raises(NumericsError, match="diverged"):
        evaluate(model, [(shown([1] * 5), torch.tensor([0]))])
