"""Parameter groups, rates, moments and the average, against their definitions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multiway.engine import optim as engine_optim
from multiway.engine.optim import (
    PART,
    Average,
    Muon,
    build_optimizers,
    keep_gradients,
    optimizer_steps,
    optimizer_tensors,
    orthogonal,
    restore_steps,
    total_norm,
    update,
)
from multiway.engine.parallel import Process, keeps_gradients, spread
from multiway.engine.schedule import learning_rate
from multiway.nn.linear import Linear, bf16_is_native
from multiway.run import Optim, Parallel, Schedule
from multiway.systems.beit3 import BEiT3, Config, MaskedDataModeling

DECAY = 0.5


@pytest.fixture
def objective() -> MaskedDataModeling:
    torch.manual_seed(0)
    shape = {"dim": 16, "depth": 3, "heads": 2, "hidden": 32, "patch": 8, "image_px": 16, "vocab": 11, "codes": 7}
    objective = MaskedDataModeling(BEiT3(Config(**shape, text_positions=9, contrast=True)), None)
    objective.init_weights()
    return objective


def groups(objective: nn.Module, optim: Optim) -> dict[str, dict[str, float]]:
    """Of every parameter: the settings of the group it is in."""
    optimizers = build_optimizers(objective, optim)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    found = [(names[p], group) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())  # each once
    return dict(found)


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vision.proj.weight", 0),
        ("vision.proj.bias", 0),
        ("vision.cls_token", 0),
        ("vision.mask_token", 0),
        ("vision.positions", 0),
        ("language.words.weight", 0),
        ("language.positions", 0),
        ("encoder.blocks.0.attention.qkv.experts.image.linear.weight", 1),
        ("encoder.blocks.1.ffn.experts.text.fc2.bias", 2),
        ("encoder.blocks.2.attention.out.experts.text.norm.weight", 3),
        ("encoder.norm.experts.image.weight", 4),
        ("mim_head.weight", 4),
        ("mlm_head.bias", 4),
        ("vision_head.weight", 4),
        ("logit_scale", 4),
    ],
)
def test_rates_fall_by_layer_from_the_top(objective: MaskedDataModeling, name: str, layer: int) -> None:
    """masked.md 1.6: decay ** (L + 1 - layer), the L + 1 = 4 of heads and final norm being 1."""
    assert groups(objective, Optim(layer_decay=DECAY))[f"model.{name}"]["scale"] == DECAY ** (4 - layer)
    assert groups(objective, Optim())[f"model.{name}"]["scale"] == 1


def test_matrices_decay_but_for_tables_of_positions_and_tokens(objective: MaskedDataModeling) -> None:
    """masked.md 1.7 and choice 25: 1-D parameters, biases, both position tables, class and mask token do not."""
    spared = {"vision.cls_token", "vision.mask_token", "vision.positions", "language.positions"}
    for decay in (1.0, DECAY):
        for name, group in groups(objective, Optim(weight_decay=0.3, layer_decay=decay)).items():
            parameter = objective.get_parameter(name)
            plain = parameter.ndim <= 1 or name.removeprefix("model.") in spared
            assert group["weight_decay"] == (0 if plain else 0.3), name
    found = groups(objective, Optim(weight_decay=0.3))
    for name in ("language.words.weight", "vision.proj.weight", "mim_head.weight"):
        assert found[f"model.{name}"]["weight_decay"] == 0.3
    for name in ("mim_head.bias", "logit_scale", "encoder.norm.experts.text.weight", "vision.positions"):
        assert found[f"model.{name}"]["weight_decay"] == 0


def test_without_layer_decay_there_are_two_groups(objective: MaskedDataModeling) -> None:
    for optim, expected in ((Optim(), 2), (Optim(layer_decay=DECAY), 10)):
        (optimizer,) = build_optimizers(objective, optim)
        assert len(optimizer.param_groups) == expected


def test_parameters_outside_the_model_count_as_the_top(objective: MaskedDataModeling) -> None:
    objective.scale = nn.Parameter(torch.ones(2, 2))
    found = groups(objective, Optim(layer_decay=DECAY))["scale"]
    assert (found["scale"], found["weight_decay"]) == (1, 0.05)


def test_the_rate_of_a_group_is_scaled(objective: MaskedDataModeling) -> None:
    optimizers = build_optimizers(objective, Optim(layer_decay=DECAY, matrices="muon"))
    for rate in (0.0, 2e-3):
        update(optimizers, rate, norm=1.0, clip=0.0)
        adamw, muon = ({group["lr"] for group in optimizer.param_groups} for optimizer in optimizers)
        assert adamw == {rate * DECAY**i for i in range(5)}
        assert muon == {rate * DECAY**i for i in (1, 2, 3)}


# --- gradients in the dtype they are computed in ----------------------------------------------------------------------


def learn(objective: MaskedDataModeling, optim: Optim, kept: bool) -> nn.Module:
    """A copy after three steps in bf16 on made-up hidden states; ``kept``: their gradients as they are computed."""
    objective = copy.deepcopy(objective)
    if kept:
        keep_gradients(objective)
    optimizers = build_optimizers(objective, optim)
    blocks: Any = objective.model.encoder.blocks
    maps = [module for block in blocks for module in block.modules() if isinstance(module, Linear)]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            found = [own(torch.randn(9, own.in_features, generator=generator)) for own in maps]
        sum(x.float().square().mean() for x in found).backward()  # type: ignore[union-attr]
        assert {own.weight.grad.dtype for own in maps} == {torch.bfloat16 if kept else torch.float32}
        for p in (objective.model.vision.positions, objective.model.mim_head.weight):  # fp32 in any case
            p.grad = torch.randn(p.shape, generator=generator)
        update(optimizers, 1e-2, norm=3.0, clip=1.0)
        objective.zero_grad()
    return objective


@pytest.mark.skipif(not bf16_is_native(), reason="oneDNN has no bf16 products for this processor")
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize("part", [1, 1000, PART])
def test_kept_gradients_move_parameters_as_their_fp32_copies_do(
    objective: MaskedDataModeling, matrices: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_optim, "PART", part)
    optim = Optim(lr=1e-2, matrices=matrices, layer_decay=0.9)
    twin, found = (dict(learn(objective, optim, kept).named_parameters()) for kept in (False, True))
    moved = [name for name, p in objective.named_parameters() if not torch.equal(p, twin[name])]
    assert len(moved) > 20
    for name, own in found.items():
        assert torch.equal(own, twin[name]), name


@pytest.mark.parametrize(("micro", "kept"), [(1, True), (2, False)])
def test_a_process_alone_keeps_the_gradients_of_one_micro_batch(
    objective: MaskedDataModeling, micro: int, kept: bool
) -> None:
    spread(objective, Process(0, 1, torch.device("cpu"), None), Parallel(micro=micro))
    assert {p.grad_dtype for p in objective.parameters()} == {None if kept else torch.float32}


def test_gradients_are_kept_where_our_products_compute_them() -> None:
    assert keeps_gradients(torch.device("cpu"), Parallel())
    assert not keeps_gradients(torch.device("cpu"), Parallel(compile=True))
    assert not keeps_gradients(torch.device("cuda"), Parallel())


@pytest.mark.parametrize(("small", "near"), [(2**16, 1e-6), (0, 1e-3)])
def test_the_norm_of_gradients_of_any_dtype(
    objective: MaskedDataModeling, small: int, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows of large values, whose norms are rounded, are worse than any matrix that is not cast."""
    monkeypatch.setattr(engine_optim, "SMALL", small)
    keep_gradients(objective)
    for i, p in enumerate(objective.parameters()):
        drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        p.grad = drawn.bfloat16() if i % 2 else drawn
    exact = torch.cat([p.grad.double().flatten() for p in objective.parameters() if p.grad is not None]).norm()
    assert total_norm(objective).dtype == torch.float32
    torch.testing.assert_close(total_norm(objective).double(), exact, rtol=near, atol=0)


def test_the_norm_of_a_large_gradient_is_that_of_its_numbers() -> None:
    module = nn.Linear(700, 900, bias=False)
    keep_gradients(module)
    drawn = torch.randn(900, 700, generator=torch.Generator().manual_seed(0)) * 1e-4
    module.weight.grad = drawn.bfloat16()
    exact = module.weight.grad.double().norm()
    torch.testing.assert_close(total_norm(module).double(), exact, rtol=3e-4, atol=0)


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1.0), (1.0, 0.25), (4.1, 1.0)])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_gradients_are_scaled_to_the_norm_allowed(
    objective: MaskedDataModeling, matrices: str, clip: float, factor: float
) -> None:
    """Moments are the first gradient's share: a tenth of it, or a twentieth."""
    optim = Optim(matrices=matrices, betas=(0.9, 0.98))
    optimizers = build_optimizers(objective, optim)
    given = {}
    for i, (name, p) in enumerate(objective.named_parameters()):
        p.grad = given[name] = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        given[name] = p.grad.clone()
    update(optimizers, 1e-3, norm=4.0, clip=clip)
    for name, moment in optimizer_tensors(objective, optimizers).items():
        name, _, kind = name.rpartition(".")
        share = {"exp_avg": 0.1 * factor, "exp_avg_sq": 0.02 * factor**2, "momentum": 0.05 * factor}[kind]
        expected = share * (given[name] ** 2 if kind == "exp_avg_sq" else given[name])
        torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-7)


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_the_schedule_at_its_corners() -> None:
    """masked.md 1.8: linspace(0, peak, warmup), then final + (peak - final) (1 + cos) / 2 over the rest."""
    schedule = Schedule(steps=110, warmup=11, final_lr=0.1)
    rates = [learning_rate(schedule, 1.0, step) for step in range(110)]
    assert rates[:11] == pytest.approx([0.1 * i for i in range(11)])
    assert rates[11] == 1.0
    assert rates[11:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * t / 99)) for t in range(99)])
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[60] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 49 / 99)))
    assert learning_rate(schedule, 1.0, 110) == learning_rate(schedule, 1.0, 500) == pytest.approx(0.1)


def test_the_schedule_without_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(Schedule(steps=10, warmup=0, final_lr=0.0), 2.0, 0) == 2.0
    assert learning_rate(Schedule(steps=10, warmup=1, final_lr=0.0), 2.0, 0) == 2.0
    assert learning_rate(Schedule(steps=10, warmup=10, final_lr=0.5), 2.0, 9) == 2.0


def rate_at(step: int, **settings: Any) -> float:
    return learning_rate(
        Schedule(**{"steps": 100, "warmup": 20, "first_lr": 0.1, "final_lr": 0.2, **settings}), 1.0, step
    )


def test_a_cosine_after_the_warm_up() -> None:
    """vision.md 2.2, with warm-up prefix: t' = t - warmup, T = total - warmup. Swin, MAE, BEiT."""
    assert [rate_at(0), rate_at(19), rate_at(20)] == pytest.approx([0.1, 1.0, 1.0])
    assert rate_at(10) == pytest.approx(0.1 + 0.9 * 10 / 19)
    assert rate_at(60) == pytest.approx(0.2 + 0.8 / 2)  # halfway through the rest
    assert rate_at(99) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 79 / 80)))
    assert rate_at(100) == pytest.approx(0.2)


def test_a_cosine_of_the_whole_run_on_which_the_warm_up_ends_with_a_jump() -> None:
    """Without the prefix: t' = t, T = total, part of SimMIM's published recipe."""
    late = {"shape": "late cosine"}
    assert [rate_at(0, **late), rate_at(19, **late)] == pytest.approx([0.1, 1.0])
    assert rate_at(20, **late) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 0.2)))
    assert rate_at(19, **late) - rate_at(20, **late) > 0.07
    assert rate_at(50, **late) == pytest.approx(0.2 + 0.8 / 2)  # halfway through the run
    assert rate_at(100, **late) == pytest.approx(0.2)
    same = {"warmup": 0}
    assert [rate_at(t, **same) for t in range(100)] == pytest.approx([rate_at(t, **same, **late) for t in range(100)])


def test_a_step_down_after_seven_eighths() -> None:
    """vision.md 7.3: SimMIM's 800 epochs, the rate a tenth from epoch 700."""
    found = [rate_at(t, steps=80, shape="step") for t in range(80)]
    assert found[:20] == pytest.approx([0.1 + 0.9 * t / 19 for t in range(20)])
    assert found[20:70] == [1.0] * 50 and found[70:] == pytest.approx([0.1] * 10)


def test_a_straight_line_after_the_warm_up() -> None:
    """masked.md 5.4: VLMo's decay of power 1."""
    found = [rate_at(t, shape="linear") for t in (0, 19, 20, 40, 60, 100)]
    assert found == pytest.approx([0.1, 1.0, 1.0, 0.8, 0.6, 0.2])


# --- the optimiser's state --------------------------------------------------------------------------------------------


def advance(objective: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, only: str = "") -> None:
    """Steps with random gradients for the parameters whose name begins so."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in objective.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if name.startswith(only) else None
        for optimizer in optimizers:
            optimizer.step()


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items()}


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_state_comes_back_also_where_parameters_never_had_a_gradient(
    objective: MaskedDataModeling, matrices: Any
) -> None:
    """Unused heads have no moments; one that is used later starts from nothing then, exactly as uninterrupted."""
    optim = Optim(lr=1e-2, matrices=matrices)
    optimizer = build_optimizers(objective, optim)
    advance(objective, optimizer, 3, "model.encoder")
    advance(objective, optimizer, 2, "model.encoder.blocks.0")
    moments, steps = copies(optimizer_tensors(objective, optimizer)), optimizer_steps(objective, optimizer)
    weights = copies(dict(objective.named_parameters()))
    assert set(steps.values()) == {3, 5} and all(name.startswith("model.encoder") for name in steps)
    assert {name.rpartition(".")[0] for name in moments} == set(steps)

    restored = build_optimizers(objective, optim)
    assert optimizer_tensors(objective, restored) == {} and optimizer_steps(objective, restored) == {}
    restore_steps(objective, restored, steps)
    assert optimizer_steps(objective, restored) == steps
    empty = optimizer_tensors(objective, restored)
    assert empty.keys() == moments.keys() and not any(x.any() for x in empty.values())
    for name, x in empty.items():
        x.copy_(moments[name])

    advance(objective, optimizer, 2)  # now all have gradients, the heads for the first time
    expected = copies(dict(objective.named_parameters())), copies(optimizer_tensors(objective, optimizer))
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_(weights[name])
    advance(objective, restored, 2)
    found = dict(objective.named_parameters()), optimizer_tensors(objective, restored)
    for one, other in zip(expected, found):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert optimizer_steps(objective, restored) == optimizer_steps(objective, optimizer)


def test_it_is_adamw_with_decoupled_decay(objective: MaskedDataModeling) -> None:
    optim = Optim(lr=0.1, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.2)
    optimizers = build_optimizers(objective, optim)
    weight = objective.model.mim_head.weight
    expected, mean, square = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in (1, 2, 3):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        expected = expected * (1 - 0.1 * 0.2)
        mean, square = 0.5 * mean + 0.5 * weight.grad, 0.75 * square + 0.25 * weight.grad**2
        scaled = (square / (1 - 0.75**step)).sqrt() + 1e-3
        expected = expected - 0.1 * (mean / (1 - 0.5**step)) / scaled
        update(optimizers, 0.1, norm=1.0, clip=0.0)
        torch.testing.assert_close(weight.detach(), expected)


# --- muon -------------------------------------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_blocks_alone(objective: MaskedDataModeling) -> None:
    adamw, muon = build_optimizers(objective, Optim(matrices="muon"))
    names = {parameter: name for name, parameter in objective.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    inside = [(name, p) for name, p in objective.named_parameters() if name.startswith("model.encoder.blocks.")]
    assert taken == {name for name, p in inside if p.ndim == 2}
    assert len(taken) == 3 * 2 * 4  # blocks, experts, and qkv out fc1 fc2
    assert taken.isdisjoint(names[p] for group in adamw.param_groups for p in group["params"])


@pytest.mark.parametrize("shape", [(2, 24, 8), (3, 8, 24), (1, 16, 16)])
def test_orthogonal_keeps_singular_vectors_and_evens_singular_values(shape: tuple[int, int, int]) -> None:
    """The quintic brings every singular value that is not tiny into 0.68 to 1.21 and leaves U and V as they are."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(x)
    assert found.shape == x.shape
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ found @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=2e-5, rtol=0)
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("together", [2**26, 24 * 8])
def test_muon_updates_as_torchs_own(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's takes one matrix at a time in bf16; three steps, decay and Nesterov's momentum included."""
    monkeypatch.setattr("multiway.engine.optim.TOGETHER", together)
    shapes = [(8, 24), (8, 24), (24, 8), (16, 16)]
    ours = [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    own = Muon([{"params": ours, "weight_decay": 0.1, "scale": 1.0}], 0.02, torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            q.grad = p.grad.clone()
        own.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=2e-3, rtol=0)  # an update is 0.02, bf16 has 3 digits
        assert (p - q).abs().mean() < 5e-4


# --- the average ------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_definition(objective: MaskedDataModeling) -> None:
    average = Average(objective, 0.75)
    expected = copies(dict(objective.named_parameters()))
    assert all(torch.equal(average.tensors[name], expected[name]) for name in expected)
    for step in range(3):
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        average.update(objective)
        for name, parameter in objective.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach()
    for name, value in expected.items():
        torch.testing.assert_close(average.tensors[name], value)


def test_the_average_is_lent_and_both_come_back_to_the_bit_also_after_an_error(objective: MaskedDataModeling) -> None:
    average = Average(objective, 0.9)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1)
    own, kept = copies(dict(objective.named_parameters())), copies(average.tensors)
    with pytest.raises(KeyError), average.applied(objective):
        for name, parameter in objective.named_parameters():
            assert torch.equal(parameter, kept[name]) and not torch.equal(parameter, own[name])
        raise KeyError
    for name, parameter in objective.named_parameters():
        assert torch.equal(parameter, own[name]) and torch.equal(average.tensors[name], kept[name])


def test_no_average_is_kept_when_none_is_wanted(objective: MaskedDataModeling) -> None:
    average, own = Average(objective, 0), copies(dict(objective.named_parameters()))
    average.update(objective)
    assert average.tensors == {}
    with average.applied(objective):
        assert all(torch.equal(parameter, own[name]) for name, parameter in objective.named_parameters())
