"""Steps that are not finite, records that cannot be read, disks that refuse: counted, listed, never silent."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from multiway.engine.train import MAX_SKIPPED, train
from multiway.errors import DataError, NumericsError, WriteError
from multiway.run import Checkpoint, Log, Parallel, Run
from tests.engine.ranks import outcome
from tests.engine.tiny import Records, Twist, build, left, rows, tensors, tiny

EVERY_STEP = {"checkpoint": Checkpoint(every=1, keep=99), "log": Log()}


def parallel(micro: int = 1) -> Parallel:
    return Parallel(precision="fp32", threads=1, micro=micro)


def go(run: Run, out: Path, twist: Twist, **options: Any) -> dict[str, Any]:
    return train(run, partial(build, out=out, twist=twist), out, **options)


def at_step(out: Path, step: int) -> dict[str, torch.Tensor]:
    return tensors(out / "checkpoints" / f"step-{step:09d}")


def moved(out: Path, step: int) -> set[str]:
    """Which groups of tensors a step changed, to the bit."""
    before, after = at_step(out, step - 1), at_step(out, step)
    assert before.keys() == after.keys()
    return {name.split("/")[0] for name in after if not torch.equal(before[name], after[name])}


def keys(run: Run, out: Path, step: int) -> dict[str, list[str]]:
    """Names of the records of a step."""
    places = build(run, out).batches.places(step - 1)
    return {kind: [Records(kind).key(place.record) for place in places[kind]] for kind in places}


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(
    what: str, step: int, micro: int, tmp_path: Path, capsys: Any
) -> None:
    run = tiny(6, parallel=parallel(micro), **EVERY_STEP)
    go(run, tmp_path, Twist(at={step: what}))
    for other in range(3, 7):  # the first step has a rate of 0
        assert moved(tmp_path, other) == (set() if other == step else {"model", "optim", "ema"}), other

    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["applied"] for row in metrics] == [other != step for other in range(1, 7)]
    assert (metrics[step - 1]["loss"] is None) == (what == "loss")
    assert metrics[step - 1]["grad_norm"] is None
    assert all(math.isfinite(row["loss"]) for row in metrics if row["step"] != step)
    listed = rows(tmp_path / "quarantine" / "skipped-steps.jsonl")
    assert listed == [{"step": step, "records": keys(run, tmp_path, step)}]
    assert f"step {step} skipped: loss or gradient is not finite; weights are untouched" in capsys.readouterr().err
    state = json.loads((tmp_path / "checkpoints" / "step-000000006" / "state.json").read_text())
    assert set(state["optim_steps"].values()) == {5}


def test_three_in_a_row_are_survived_and_four_end_the_run(tmp_path: Path) -> None:
    run = tiny(9, **EVERY_STEP)
    bad = range(3, 3 + MAX_SKIPPED)
    go(run, tmp_path / "three", Twist(at=dict.fromkeys(bad, "loss")))
    assert moved(tmp_path / "three", 3 + MAX_SKIPPED)

    out, more = tmp_path / "four", Twist(at=dict.fromkeys([*bad, 3 + MAX_SKIPPED], "gradient"))
    for _ in range(2):  # started again, it counts on and ends again
        with pytest.raises(NumericsError, match="4 steps in a row, up to step 6, .*/skipped-steps.jsonl") as caught:
            go(run, out, more)
        assert caught.value.exit_code == 76
        assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
        assert [row["step"] for row in rows(out / "quarantine" / "skipped-steps.jsonl")] == [3, 4, 5, 6]
        assert at_step(out, 5).keys() and not moved(out, 5)
    go(run, out, Twist())  # whatever it was has gone
    assert [row["applied"] for row in rows(out / "metrics.jsonl")] == [True] * 2 + [False] * 3 + [True] * 4


def test_one_process_of_two_is_enough_to_skip_on_both(tmp_path: Path) -> None:
    """And the records only one of them cannot read are counted by both."""
    run, log = tiny(6, **EVERY_STEP), tmp_path / "log"
    twist = Twist(at={3: "loss", 5: "gradient"}, rank=1, bad=frozenset({7, 8}))
    assert outcome(2, run, tmp_path / "run", twist, log=log) == [0, 0], log.read_text()
    folder = tmp_path / "run" / "checkpoints"
    for step in (3, 4, 5, 6):
        names = [path.name for path in sorted((folder / f"step-{step:09d}").glob("*.safetensors"))]
        assert len(names) == 6  # three groups, two ranks
        same = [
            (folder / f"step-{step:09d}" / name).read_bytes() == (folder / f"step-{step - 1:09d}" / name).read_bytes()
            for name in names
        ]
        assert same == [step in (3, 5)] * 6
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["applied"] for row in metrics] == [step not in (3, 5) for step in range(1, 7)]
    assert [row["step"] for row in rows(tmp_path / "run" / "quarantine" / "skipped-steps.jsonl")] == [3, 5]

    found = [rows(tmp_path / "run" / "quarantine" / f"rank-{rank}.jsonl") for rank in (0, 1)]
    state = json.loads((folder / "step-000000006" / "state.json").read_text())
    assert state["bad_records"] == {"truncated": len(found[0]) + len(found[1])}
    go(run, tmp_path / "one", Twist(bad=twist.bad))
    one = rows(tmp_path / "one" / "quarantine" / "rank-0.jsonl")
    assert sorted((row["step"], row["record"]) for some in found for row in some) == sorted(
        (row["step"], row["record"]) for row in one
    )
    assert len(found[0]) and len(found[1])


# --- bad records ------------------------------------------------------------------------------------------------------


def test_bad_records_are_replaced_counted_and_listed_once_whatever_happens(tmp_path: Path) -> None:
    run, twist = tiny(9), Twist(bad=frozenset({3, 4, 11}))
    go(run, tmp_path / "whole", twist)
    listed = rows(tmp_path / "whole" / "quarantine" / "rank-0.jsonl")
    asked = [
        (step, place.record)
        for step in range(1, 10)
        for place in build(run, tmp_path).batches.places(step - 1)["image"]
        if place.record in twist.bad
    ]
    expected = [(step, bad) for step, record in asked for bad in ([3, 4] if record == 3 else [record])]
    assert [(row["step"], row["record"]) for row in listed] == expected
    assert listed[0] == {
        "kind": "image", "source": 0, "record": expected[0][1], "key": f"images/{expected[0][1]:03d}.png",
        "reason": "truncated", "message": f"images/{expected[0][1]:03d}.png: truncated picture", "step": expected[0][0],
    }  # fmt: skip
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step-000000009" / "state.json").read_text())
    assert state["bad_records"] == {"truncated": len(expected)}

    # Ended after step 7, its checkpoints lost: all steps are run again, and nothing is listed twice.
    out = tmp_path / "again"
    with pytest.raises(NumericsError):
        go(run, out, Twist(bad=twist.bad, at=dict.fromkeys([4, 5, 6, 7], "loss")))
    assert len(rows(out / "quarantine" / "skipped-steps.jsonl")) == 4
    (out / "checkpoints").rename(tmp_path / "lost")
    go(run, out, twist)
    assert rows(out / "quarantine" / "rank-0.jsonl") == listed
    assert rows(out / "quarantine" / "skipped-steps.jsonl") == []
    assert left(out) == left(tmp_path / "whole")


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_bad_records_end_the_run_of_all(world: int, tmp_path: Path) -> None:
    """The window is 10,000 records: a share of 0.0004 is 4 of them, on whichever process they are."""
    run = tiny(20, log=Log())
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, max_bad=4e-4))
    twist, log = Twist(bad=frozenset(range(0, 21, 4))), tmp_path / "log"
    assert outcome(world, run, tmp_path / "run", twist, log=log) == [65] * world
    told = re.findall(r"rank (\d): (\d) of the last 10000 records are bad \(truncated (\d)\)", log.read_text())
    assert sorted(rank for rank, _, _ in told) == ["0", "1"][:world]
    listed = sum(len(rows(file)) for file in (tmp_path / "run" / "quarantine").glob("rank-*.jsonl"))
    assert listed > 4
    assert {(int(bad), int(truncated)) for _, bad, truncated in told} == {(listed, listed)}


def test_a_source_that_is_all_bad_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image: 9 records in a row of source 0 cannot be loaded"):
        go(tiny(), tmp_path, Twist(bad=frozenset(range(21))))


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_metrics_that_cannot_be_written_end_the_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == tmp_path / "metrics.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WriteError, match="metrics.jsonl: cannot write: No space left on device"):
        go(tiny(1), tmp_path, Twist())
