"""Killed anywhere, stopped, resumed on another number of processes, split otherwise: the same run."""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from multiway.engine.checkpoint import newest
from multiway.engine.train import train
from multiway.errors import ConfigError
from multiway.nn.linear import LEAN_WIDTH
from multiway.run import Checkpoint, Log, Optim, Parallel, Run
from tests.engine.ranks import Crash, Ranks, kill_seed, outcome, run_tiny
from tests.engine.tiny import MODEL, SIZES, Twist, build, left, rows, tiny

STEPS = 16


def spread(**changes: Any) -> Parallel:
    return Parallel(**{"precision": "fp32", "threads": 1, **changes})


def done(out: Path) -> int:
    """Steps that have a row."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_at_random(world: int, run: Run, out: Path, log: Path, kills: int, rng: random.Random) -> int:
    """Kill the run at random instants and start it again, as often as asked or until it is done; then let it end."""
    landed = 0
    while landed < kills:
        with Ranks(world, run_tiny, run, out, log=log) as ranks:
            # At an instant after some step, or before the first: in a save, an evaluation, a step, the start.
            target = rng.randint(0, max(0, run.schedule.steps - 4))
            while done(out) < target and None in ranks.wait(0):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05) if target else rng.uniform(0, 0.3))
            ranks.send(signal.SIGKILL, rng.sample(range(world), world))
            codes = ranks.wait()
            lost = {1} if world > 1 else set()  # a rank may see another die before it is killed itself
            assert set(codes) <= {0, -signal.SIGKILL, *lost}, ranks.said
            if set(codes) == {0}:
                break
            landed += 1
    assert outcome(world, run, out, log=log) == [0] * world, log.read_text()
    return landed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert outcome(1, tiny(STEPS), folder / "run", log=folder / "log") == [0]
    return left(folder / "run")


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_instants_it_ends_the_same_to_the_bit(
    kills: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(kill_seed())
    landed = rounds = 0
    while landed < kills:
        out, rounds = tmp_path / str(rounds), rounds + 1
        landed += kill_at_random(1, tiny(STEPS), out, tmp_path / "log", min(kills - landed, 6), rng)
        assert left(out) == whole
        assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_two_processes_killed_at_random_instants_end_the_same_to_the_bit(tmp_path: Path) -> None:
    rng = random.Random(kill_seed())
    assert outcome(2, tiny(STEPS), tmp_path / "whole", log=tmp_path / "log") == [0, 0]
    landed = rounds = 0
    while landed < 20:
        out, rounds = tmp_path / str(rounds), rounds + 1
        landed += kill_at_random(2, tiny(STEPS), out, tmp_path / "log", 5, rng)
        assert left(out) == left(tmp_path / "whole")


def test_killed_at_every_point_of_a_save_it_ends_the_same_to_the_bit(whole: dict[str, Any], tmp_path: Path) -> None:
    """One run, killed at another point after every start."""
    run, out, log = tiny(STEPS), tmp_path / "run", tmp_path / "log"
    for point, save, found in [
        ("made", 1, 0),
        ("written", 2, 2),
        ("manifest", 2, 4),
        ("renamed", 2, 8),
        ("purged", 1, 10),
    ]:
        assert outcome(1, run, out, crash=Crash(point, save), log=log) == [-signal.SIGKILL]
        saved = newest(out / "checkpoints", note=lambda _: None)
        assert (saved.step if saved else 0) == found, point
    assert outcome(1, run, out, log=log) == [0]
    assert left(out) == whole


def test_killed_after_the_last_save_it_still_evaluates_and_exports(whole: dict[str, Any], tmp_path: Path) -> None:
    run, out, log = tiny(STEPS), tmp_path / "run", tmp_path / "log"
    assert outcome(1, run, out, crash=Crash("purged", STEPS // 2), log=log) == [-signal.SIGKILL]
    assert not (out / "final").exists()
    for _ in range(2):  # a finished run may be started again
        assert outcome(1, run, out, log=log) == [0]
        assert left(out) == whole


# --- another number of processes --------------------------------------------------------------------------------------


def consumed(outs: list[tuple[Path, range]]) -> list[dict[str, list[int]]]:
    """Records of each kind in every step: steps of a range from the notes in its folder, ranks in order."""
    steps: dict[int, dict[str, list[int]]] = {}
    for folder, own in outs:
        for file in sorted(folder.glob("samples-*.jsonl")):
            for row in rows(file):
                if row["step"] not in own:
                    continue
                part = len(row["sample"]) // len(SIZES)
                for i, kind in enumerate(SIZES):
                    records = row["sample"][i * part : (i + 1) * part]
                    steps.setdefault(row["step"], {}).setdefault(kind, []).extend(records)
    return [steps[step] for step in sorted(steps)]


@pytest.mark.parametrize(
    "stages",
    [
        [(2, "replicate"), (1, "full"), (2, "full")],
        pytest.param([(2, "full"), (1, "full"), (2, "replicate")], marks=pytest.mark.slow),
        pytest.param([(1, "full"), (2, "full"), (1, "full")], marks=pytest.mark.slow),
        pytest.param([(4, "full"), (1, "full"), (2, "replicate")], marks=pytest.mark.slow),
    ],
    ids=lambda stages: "-".join(f"{world}{shard}" for world, shard in stages),
)
def test_other_numbers_of_processes_consume_the_same_and_learn_the_same(stages: list[Any], tmp_path: Path) -> None:
    """Each stage is ended by a SIGTERM to its last process alone, after steps 3 and 6: before evaluations, too."""
    run, out, log = tiny(9, checkpoint=Checkpoint(every=100)), tmp_path / "run", tmp_path / "log"
    ends = [3, 6, 9]
    notes = []
    for (world, shard), end in zip(stages, ends):
        twist = Twist(note=True, at={end: "term"} if end < 9 else {}, rank=world - 1)
        stage = dataclasses.replace(run, parallel=spread(shard=shard))
        assert outcome(world, stage, out, twist, log=log) == [75 if end < 9 else 0] * world, log.read_text()
        assert done(out) == end
        notes.append((tmp_path / f"notes-{end}", range(end - 2, end + 1)))
        notes[-1][0].mkdir()
        for file in out.glob("samples-*.jsonl"):
            file.rename(notes[-1][0] / file.name)
    assert outcome(1, run, tmp_path / "one", Twist(note=True), log=log) == [0]

    # The same samples in every step; every record once in every epoch.
    steps = consumed(notes)
    expected = consumed([(tmp_path / "one", range(1, 10))])
    assert len(steps) == 9
    assert steps == expected
    for kind, size in SIZES.items():
        stream = list(chain.from_iterable(step[kind] for step in steps))
        for epoch in range(len(stream) // size):
            assert Counter(stream[epoch * size : (epoch + 1) * size]) == Counter(range(size)), (kind, epoch)

    # The same losses and figures.
    one, many = rows(tmp_path / "one" / "metrics.jsonl"), rows(out / "metrics.jsonl")
    assert [row["loss"] for row in many] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["grad_norm"] for row in many] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)
    one, many = rows(tmp_path / "one" / "eval.jsonl"), rows(out / "eval.jsonl")
    assert [row["step"] for row in many] == [3, 6, 9]
    assert [row["image"] for row in many] == pytest.approx([row["image"] for row in one], rel=1e-4)

    # The exported weights are the averaged ones, close to those of one process.
    weights, other = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "one", out))
    assert weights.keys() == other.keys()
    for name in weights:
        assert (weights[name] - other[name]).abs().max() < 1e-4, name


# --- split otherwise --------------------------------------------------------------------------------------------------


def curve(world: int, run: Run, out: Path, twist: Twist) -> list[float]:
    assert outcome(world, run, out, twist, log=out.with_suffix(".log")) == [0] * world
    return [row["loss"] for row in rows(out / "metrics.jsonl")]


def test_micro_batches_times_processes_make_the_same_step(tmp_path: Path) -> None:
    """Texts differ in length, so the parts have different counts; the mean of the parts' means must not pass."""
    curves, weights = [], []
    for micro, world in [(4, 1), (2, 2), (1, 4)]:
        run = tiny(5, parallel=spread(micro=micro), checkpoint=Checkpoint(every=100), log=Log())
        curves.append(curve(world, run, tmp_path / f"{micro}x{world}", Twist()))
        weights.append(load_file(tmp_path / f"{micro}x{world}" / "final" / "model.safetensors"))
        assert curves[-1] == pytest.approx(curves[0], rel=1e-6)
        assert all((weights[-1][name] - weights[0][name]).abs().max() < 5e-5 for name in weights[0])
    run = tiny(5, parallel=spread(micro=4), checkpoint=Checkpoint(every=100), log=Log())
    mistaken = curve(1, run, tmp_path / "mistaken", Twist(own_counts=True))
    assert mistaken != pytest.approx(curves[0], rel=1e-3)


def test_muon_is_that_of_one_process_and_survives_a_kill(tmp_path: Path) -> None:
    """It needs whole matrices: on two processes each holds half of every one. Rows are wide enough for `lean`."""
    optim = Optim(lr=3e-3, matrices="muon", layer_decay=0.9, ema=0.9)
    run = tiny(6, model=dataclasses.replace(MODEL, hidden=LEAN_WIDTH), optim=optim)
    one, two = (curve(world, run, tmp_path / str(world), Twist()) for world in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    assert one[-1] < one[0]
    out, log = tmp_path / "killed", tmp_path / "log"
    assert outcome(1, run, out, crash=Crash("purged", 2), log=log) == [-signal.SIGKILL]
    assert outcome(1, run, out, log=log) == [0]
    assert left(out) == left(tmp_path / "1")


def test_what_compares_all_samples_and_cannot_join_micro_batches_refuses_them(tmp_path: Path) -> None:
    run = tiny(kind="both", parallel=spread(micro=2))
    with pytest.raises(ConfigError, match="Both compares all samples of a step .* must be 1, got 2. Take fewer items"):
        train(run, partial(build, out=tmp_path), tmp_path)


def test_contrast_in_micro_batches_over_two_processes_is_that_of_one_batch(tmp_path: Path) -> None:
    """Micro-batches are encoded again in the backward, inside FSDP too; the whole step is compared at once."""
    optim = Optim(lr=3e-3, clip=0.5)
    run = tiny(5, kind="contrast", optim=optim, checkpoint=Checkpoint(every=100), log=Log())
    curves, norms, weights = [], [], []
    for world, micro in ((1, 1), (1, 4), (2, 2), (2, 4)):
        out = tmp_path / f"{world}x{micro}"
        curves.append(curve(world, dataclasses.replace(run, parallel=spread(micro=micro)), out, Twist()))
        norms.append([row["grad_norm"] for row in rows(out / "metrics.jsonl")])
        weights.append(load_file(out / "final" / "model.safetensors"))
        assert curves[-1] == pytest.approx(curves[0], rel=1e-5)
        assert norms[-1] == pytest.approx(norms[0], rel=1e-4)
        assert all((weights[-1][name] - weights[0][name]).abs().max() < 5e-5 for name in weights[0])
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("kind", ["contrast", "both"])
def test_contrast_over_two_processes_is_that_of_one(kind: str, tmp_path: Path) -> None:
    run = tiny(5, kind=kind, checkpoint=Checkpoint(every=100), log=Log())
    one, two = (curve(world, run, tmp_path / str(world), Twist()) for world in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    norms = [[row["grad_norm"] for row in rows(tmp_path / world / "metrics.jsonl")] for world in "12"]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert one[-1] < one[0]
