"""However a step is computed, the loss follows the same curve: G10 of reliability, the noise floor measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multiway.engine.checkpoint import newest
from multiway.engine.train import Job, train
from multiway.run import Checkpoint, Log, Optim, Parallel, Run, Schedule
from tests.engine.ranks import Ranks
from tests.engine.tiny import Twist, build, rows, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 400


def learn(run: Run, out: Path, twist: Twist, nudge: float = 0.0) -> None:
    """Train; ``nudge`` moves one weight before the first step."""

    def nudged(run: Run) -> Job:
        job = build(run, out, twist)
        with torch.no_grad():
            job.objective.model.mim_head.weight[0, 0] += nudge  # type: ignore[union-attr]
        return job

    train(run, nudged, out)


def curve(out: Path, world: int = 1, *, twist: Twist | None = None, nudge: float = 0.0, **parallel: Any) -> Tensor:
    """Loss of every step, float64 (STEPS,)."""
    run = tiny(
        STEPS, checkpoint=Checkpoint(every=10_000), log=Log(), optim=Optim(lr=3e-3, layer_decay=0.9),
        schedule=Schedule(steps=STEPS, warmup=20, final_lr=1e-4), parallel=how(**parallel),
    )  # fmt: skip
    with Ranks(world, learn, run, out, twist or Twist(), nudge, log=out.with_suffix(".log")) as ranks:
        assert ranks.wait(1000) == [0] * world, ranks.said
    return torch.tensor([row["loss"] for row in rows(out / "metrics.jsonl")], dtype=torch.float64)


def how(**parallel: Any) -> Parallel:
    return Parallel(**{"precision": "fp32", "threads": 1, **parallel})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The curve of one process in fp32, nothing else; it must fall, or it hides what diverges."""
    found = curve(tmp_path_factory.mktemp("plain") / "run")
    assert found[-50:].mean() < 0.5 * found[0]
    return found


@pytest.fixture(scope="module")
def floor(plain: Tensor, tmp_path_factory: pytest.TempPathFactory) -> float:
    """What one weight moved by 1e-7 makes of the curve: no variant can be held to less."""
    found = apart(curve(tmp_path_factory.mktemp("floor") / "run", nudge=1e-7), plain).max().item()
    print(f"noise floor {found:.1e}")
    assert found > 0
    return found


def apart(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other) / other).abs()


def within_fp32(found: Tensor, plain: Tensor, floor: float) -> bool:
    off = apart(found, plain)
    print(f"step 1 {off[0]:.1e}, first 20 {off[:20].max():.1e}, all {off.max():.1e}")
    return bool(off[0] <= 5e-7 and off[:20].max() <= 5e-6 and off.max() <= max(10 * floor, 1e-5))


def within_bf16(found: Tensor, plain: Tensor) -> bool:
    off, end = apart(found, plain), apart(found[-50:].mean(), plain[-50:].mean())
    print(f"step 1 {off[0]:.1e}, first 20 {off[:20].max():.1e}, all {off.max():.1e}, last 50 {end:.1e}")
    return bool(off[0] <= 2e-4 and off[:20].max() <= 1e-3 and end <= 0.01)


def test_the_same_set_up_gives_the_same_bits(plain: Tensor, tmp_path: Path) -> None:
    assert torch.equal(curve(tmp_path / "run"), plain)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {"micro": 4}),
        (1, {"recompute": 2}),
        (1, {"threads": 2}),
        (1, {"compile": True}),
        (2, {}),
        (2, {"shard": "replicate"}),
        (2, {"micro": 2, "recompute": 1}),
    ],
)
def test_in_fp32_only_rounding_differs(
    world: int, parallel: dict[str, Any], plain: Tensor, floor: float, tmp_path: Path
) -> None:
    assert within_fp32(curve(tmp_path / "run", world, **parallel), plain, floor)


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {}), (2, {"recompute": 2, "compile": True})])
def test_in_bf16_the_curve_is_near(world: int, parallel: dict[str, Any], plain: Tensor, tmp_path: Path) -> None:
    assert within_bf16(curve(tmp_path / "run", world, precision="bf16", **parallel), plain)


@pytest.mark.parametrize("world", [1, 2])
def test_fast_paths_of_large_models_change_rounding_alone(
    world: int, plain: Tensor, floor: float, tmp_path: Path
) -> None:
    large: dict[str, Any] = {"twist": Twist(large=True), "threads": 2}
    assert within_fp32(curve(tmp_path / "fp32", world, **large), plain, floor)
    assert within_bf16(curve(tmp_path / "bf16", world, precision="bf16", **large), plain)


def test_the_bounds_notice_a_mistake(plain: Tensor, floor: float, tmp_path: Path) -> None:
    """The mean of the micro-batches' means instead of the sum over global counts."""
    mistaken = curve(tmp_path / "run", twist=Twist(own_counts=True), micro=4)
    assert not within_fp32(mistaken, plain, floor)
    assert not within_bf16(mistaken, plain)


def gradients(out: Path, world: int = 1, **parallel: Any) -> dict[str, Tensor]:
    """Of one step, as the first moments are a tenth of them."""
    run = tiny(1, log=Log(), optim=Optim(), parallel=how(**parallel))
    with Ranks(world, learn, run, out, Twist(), log=out.with_suffix(".log")) as ranks:
        assert ranks.wait(600) == [0] * world, ranks.said
    found = newest(out / "checkpoints", note=lambda _: None)
    assert found is not None
    moments = {name: torch.zeros(entry["shape"]) for name, entry in found.groups["optim"].items()}
    found.load("optim", moments)
    return {name: x.double().flatten() for name, x in moments.items() if name.endswith(".exp_avg")}


@pytest.mark.parametrize(
    ("world", "parallel", "least"),
    [
        (1, {"micro": 4}, 0.999999),
        (1, {"recompute": 2}, 0.999999),
        (1, {"compile": True}, 0.999999),
        (2, {}, 0.999999),
        (2, {"shard": "replicate", "micro": 2}, 0.999999),
        (1, {"precision": "bf16"}, 0.999),
        (2, {"precision": "bf16", "micro": 2, "recompute": 2}, 0.999),
    ],
)
def test_gradients_of_a_step_point_the_same_way(
    world: int, parallel: dict[str, Any], least: float, tmp_path: Path
) -> None:
    plain, found = gradients(tmp_path / "plain"), gradients(tmp_path / "run", world, **parallel)
    assert plain.keys() == found.keys() and len(plain) > 50
    cosines = {name: float(torch.cosine_similarity(plain[name], found[name], dim=0)) for name in plain}
    worst = min(cosines, key=lambda name: cosines[name])
    print(worst, cosines[worst])
    assert cosines[worst] >= least
