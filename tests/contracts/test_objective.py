"""What every objective must keep, over every system at toy size."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway.engine.parallel import recompute
from multiway.errors import ConversionError
from multiway.types import Batch, Objective
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import ALL, COUNTS, PICTURED, TOYS, WORDS, Toy, randomize

MASKED = [toy for toy in TOYS if toy.name.startswith("masked-") and toy.kinds == ALL and toy.build().splittable]


def named(toys: tuple[Toy, ...] | list[Toy]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("toy", toys, ids=lambda toy: toy.name)


def initialized(toy: Toy, seed: int = 0) -> Objective:
    objective = toy.build()
    torch.manual_seed(seed)
    objective.init_weights()
    return objective


def loss_of(objective: Objective, batch: Batch) -> Tensor:
    return objective(batch, objective.counts(batch)).loss


def gradients(objective: Objective) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in objective.named_parameters()}


@named(TOYS)
def test_initialisation_sets_every_parameter(toy: Toy) -> None:
    first, second = toy.build(), toy.build()
    for objective in (first, second):
        with torch.no_grad():
            for tensor in (*objective.parameters(), *objective.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        torch.manual_seed(3)
        objective.init_weights()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


@named(TOYS)
def test_every_parameter_gets_a_gradient(toy: Toy) -> None:
    objective = initialized(toy)
    loss_of(objective, toy.batch()).backward()
    without = {name for name, grad in gradients(objective).items() if grad is None or not grad.any()}
    assert without == toy.untrained
    assert all(grad is None or grad.isfinite().all() for grad in gradients(objective).values())


@named(TOYS)
def test_the_loss_at_the_start_is_that_of_a_guess(toy: Toy) -> None:
    objective = initialized(toy)
    batch = toy.batch(counts=dict.fromkeys(toy.kinds, 16))
    counts = objective.counts(batch)
    sums = objective(batch, counts).sums
    for term, guess in toy.guess.items():
        assert float(sums[term]) / counts[term] == pytest.approx(guess, rel=0.1)
    assert {name.split("/")[0] for name in sums} == set(counts)


@named(TOYS)
def test_two_runs_are_bitwise_equal(toy: Toy) -> None:
    results = []
    for _ in range(2):
        objective = initialized(toy)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of(objective, toy.batch(seed=step))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, [p.detach().clone() for p in objective.parameters()]))
    (first, a), (second, b) = results
    assert first == second
    assert len(set(first)) == 3, "the steps changed nothing"
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@named([toy for toy in TOYS if toy.bf16])
def test_bf16_is_near_fp32(toy: Toy) -> None:
    objective = initialized(toy)
    batch = toy.batch()
    loss = loss_of(objective, batch)
    loss.backward()
    exact = gradients(objective)
    objective.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = loss_of(objective, batch)
    near.backward()
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(loss.item(), rel=5e-3)
    assert near.item() != loss.item(), "nothing ran in bf16"
    pairs = [(g, gradients(objective)[name]) for name, g in exact.items() if g is not None]
    size, apart = (
        torch.stack([x.norm() for x in own]).norm() for own in ([g for g, _ in pairs], [g - h for g, h in pairs])
    )
    assert apart < 0.05 * size


@named(TOYS)
def test_recomputed_activations_give_the_same_gradients(toy: Toy) -> None:
    objective = randomized(toy)
    batch = (drop(toy, 0.3) if toy.drops else toy).batch()
    loss = loss_of(objective, batch)
    loss.backward()
    kept = gradients(objective)
    objective.zero_grad(set_to_none=True)
    for block in objective.apply_model(lambda model: model.encoder.blocks[:2]):
        recompute(block)
    again = loss_of(objective, batch)
    again.backward()
    assert again.item() == loss.item()
    for name, grad in gradients(objective).items():
        assert (grad is None and kept[name] is None) or torch.equal(grad, kept[name]), name


def randomized(toy: Toy) -> Objective:
    objective = toy.build()
    randomize(objective)
    return objective


def drop(toy: Toy, rate: float) -> Toy:
    """The toy with stochastic depth of ``rate`` in every block."""

    def build() -> Objective:
        objective = toy.build()
        for block in objective.apply_model(lambda model: model.encoder.blocks):
            block.drop_rate = rate
        return objective

    branches = 2 * toy.build().apply_model(lambda model: model.layers)
    return dataclasses.replace(toy, build=build, collate=dataclasses.replace(toy.collate, branches=branches))


@named([toy for toy in TOYS if toy.drops])
def test_stochastic_depth_follows_the_draws_of_the_batch(toy: Toy) -> None:
    dropping = drop(toy, 0.5)
    objective, batch = randomized(dropping), dropping.batch()
    assert batch["drop_path"].shape == (2 * objective.apply_model(lambda model: model.layers), len(batch["sample"]))
    without = {key: value for key, value in batch.items() if key != "drop_path"}
    assert loss_of(objective, batch).item() == loss_of(objective, batch).item()
    assert loss_of(objective, batch).item() != loss_of(objective, without).item()


@named(TOYS)
def test_weights_survive_conversion_to_published_layouts(toy: Toy) -> None:
    model = randomized(toy).apply_model(lambda model: model)
    state = model.state_dict()
    held = 0
    for layout in sys.modules[type(model).__module__].LAYOUTS.values():
        try:
            theirs = to_theirs(state, layout)
        except ConversionError:
            continue  # another kind of model of this system
        back = to_ours(theirs, layout, state)
        assert list(back) == list(state)
        assert all(torch.equal(back[key], state[key]) for key in state)
        assert sum(x.numel() for x in theirs.values()) == sum(x.numel() for x in state.values())
        held += 1
    assert (held > 0) == toy.published


@named([toy for toy in PICTURED if toy.build().splittable])
def test_the_loss_of_pictures_does_not_depend_on_micro_batches(toy: Toy) -> None:
    objective = randomized(toy)
    whole = toy.batch(counts={"image": 4})
    total = objective.counts(whole)
    loss = loss_of(objective, whole)
    loss.backward()
    want = gradients(objective)
    objective.zero_grad(set_to_none=True)
    samples = toy.samples(counts={"image": 4})["image"]
    losses = []
    for part in (samples[:1], samples[1:]):
        out = objective(toy.collate({"image": part}), total)
        out.loss.backward()
        losses.append(out.loss.item())
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in gradients(objective).items():
        expected = want[name]
        if grad is None or expected is None:
            assert grad is expected, name
        else:
            assert (grad - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name


@named(MASKED)
def test_hidden_words_do_not_leak(toy: Toy) -> None:
    """Other words under ``<mask>``: other targets, the same tokens, to the bit."""
    objective, before = randomized(toy), toy.batch()
    samples, start = toy.samples(), 0
    for kind in ("pair", "text"):
        for i, record in enumerate(samples[kind]):
            assert record.text is not None
            shown = before["text"][start + 1 : start + 1 + len(record.text)].numpy()
            other = WORDS.first + (record.text - WORDS.first + 1) % (WORDS.stop - WORDS.first)
            text = np.where(shown == WORDS.mask_id, other, record.text)
            samples[kind][i] = dataclasses.replace(record, text=text)
            start += len(text) + 2
    after = toy.collate(samples)
    assert torch.equal(before["text_hidden"], after["text_hidden"])
    assert (before["text_target"] != after["text_target"]).float().mean() > 0.5
    assert torch.equal(tokens(objective, before), tokens(objective, after))


def tokens(objective: Objective, batch: Batch) -> Tensor:
    inputs = {"image": batch["image"], "text": batch["text"], "hide": batch["image_hide"]}
    return objective.apply_model(lambda model: model(batch["plan"], **inputs).values)


@named(MASKED)
@pytest.mark.parametrize("parts", [2, 4])
def test_the_loss_does_not_depend_on_the_number_of_micro_batches(toy: Toy, parts: int) -> None:
    objective = randomized(toy)
    kinds = {"image": 4, "pair": 4, "text": 8}
    whole = toy.batch(counts=kinds)
    total = objective.counts(whole)
    loss = objective(whole, total).loss
    loss.backward()
    want = gradients(objective)
    objective.zero_grad(set_to_none=True)
    losses, seen = torch.zeros(()), dict.fromkeys(total, 0)
    for part in range(parts):
        # Every micro-batch gets every kind, but not the same number of hidden words.
        micro = toy.collate({kind: own[part::parts] for kind, own in toy.samples(counts=kinds).items()})
        seen = {term: seen[term] + n for term, n in objective.counts(micro).items()}
        out = objective(micro, total)
        out.loss.backward()
        losses += out.loss.detach()
    assert seen == total
    assert losses.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, grad in gradients(objective).items():
        assert (grad - want[name]).norm() <= 1e-6 * want[name].norm() + 1e-9, name


@named(MASKED)
@pytest.mark.parametrize("kinds", [("image",), ("pair",), ("text",), ("image", "text")], ids="+".join)
def test_a_batch_may_lack_kinds(toy: Toy, kinds: tuple[str, ...]) -> None:
    objective = randomized(toy)
    whole = toy.batch()
    total = objective.counts(whole)
    reference = objective(whole, total)
    batch = toy.batch(counts={kind: COUNTS[kind] for kind in kinds})
    counts = objective.counts(batch)
    out = objective(batch, counts)
    terms = {"image": ["image"], "pair": ["pair_image", "pair_text"], "text": ["text"]}
    present = [term for kind in kinds for term in terms[kind]]
    assert {term for term, n in counts.items() if n} == set(present)
    for term in present:
        assert out.sums[term].item() == pytest.approx(reference.sums[term].item(), rel=1e-5)
    expected = sum(reference.sums[term].item() / total[term] for term in present)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    out.loss.backward()
