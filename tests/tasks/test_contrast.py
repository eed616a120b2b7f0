"""Contrast of pictures and texts: several micro-batches are one batch at equal maths, in the memory of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from multiway.rehearsal import Recorder
from multiway.systems.beit3 import BEiT3
from multiway.systems.clip import CLIP
from multiway.systems.siglip import SigLIP
from multiway.tasks.retrieval import ImageTextContrast, ImageTextSigmoid
from multiway.types import Batch
from tests.contracts.toys import CAUSAL, CLIP_RESNET, CLIP_VIT, CONTRAST, DUAL, SIGLIP, randomize, sample

CASES: dict[str, tuple[Callable[[], ImageTextContrast], bool]] = {
    "clip": (lambda: ImageTextContrast(CLIP(CLIP_VIT)), True),
    "siglip": (lambda: ImageTextSigmoid(SigLIP(SIGLIP)), False),
    "beit3": (lambda: ImageTextContrast(BEiT3(CONTRAST)), False),
}


def batches(count: int, parts: int, causal: bool, keep: float = 1.0) -> list[Batch]:
    """``count`` pairs in so many micro-batches."""
    collate = dataclasses.replace(CAUSAL if causal else DUAL, keep=keep)
    pairs = [sample(0, "pair", i) for i in range(count)]
    size = count // parts
    return [collate({"pair": pairs[i * size : (i + 1) * size]}) for i in range(parts)]


def step(objective: ImageTextContrast, given: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step; one micro-batch is given as it is."""
    counts = {"contrast": sum(objective.counts(batch)["contrast"] for batch in given)}
    objective.zero_grad(set_to_none=True)
    loss = objective(given[0] if len(given) == 1 else given, counts).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_give_loss_and_gradients_of_the_whole(case: str, parts: int) -> None:
    build, causal = CASES[case]
    objective = build()
    randomize(objective)
    loss, want = step(objective, batches(8, 1, causal))
    again, got = step(objective, batches(8, parts, causal))
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    assert got.keys() == want.keys() and len(want) > 30
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-8, name


def test_the_whole_is_not_the_sum_of_its_parts() -> None:
    objective = CASES["clip"][0]()
    randomize(objective)
    whole, _ = step(objective, batches(8, 1, True))
    with torch.no_grad():
        parts = sum(objective(batch, {"contrast": 8}).loss for batch in batches(8, 4, True))
    assert abs(whole - parts) > 0.1 * abs(whole)


def most(objective: ImageTextContrast, given: list[Batch]) -> float:
    """Bytes at the worst moment of a step, of what it makes."""
    with Recorder() as recorder:
        step(objective, given)
    return recorder.trace().peak()


def test_a_batch_of_512_takes_the_memory_of_its_micro_batches() -> None:
    """Counted, not measured: every tensor's storage as it comes and goes. Halves take little more than half."""
    shape = dataclasses.replace(CLIP_VIT, depth=6, hidden=128)
    objective = ImageTextContrast(CLIP(shape))
    randomize(objective)
    whole, halves, sixteen = (most(objective, batches(512, parts, True, keep=0.5)) for parts in (1, 2, 16))
    assert halves < 0.65 * whole
    assert sixteen < 0.2 * whole


def test_models_whose_pictures_depend_on_each_other_do_not_join() -> None:
    assert ImageTextContrast(CLIP(CLIP_VIT)).joins
    assert not ImageTextContrast(CLIP(CLIP_RESNET)).joins
    assert not ImageTextContrast(CLIP(CLIP_VIT)).splittable
