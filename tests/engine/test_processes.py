"""Signals, locks, and processes that wait for each other, die or hang."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from multiway.engine import parallel
from multiway.engine.train import Job, train
from multiway.errors import ConfigError
from multiway.run import Checkpoint, Log, Run
from tests.engine.ranks import Ranks, free_port, kill_seed, outcome, run_tiny
from tests.engine.tiny import Twist, build, left, rows, tiny


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it has not come in two minutes")


def wait_for(path: Path, ranks: Ranks, lines: int = 1) -> None:
    """Until a file has so many lines."""
    wait_until(lambda: (path.exists() and path.read_text().count("\n") >= lines) or None not in ranks.wait(0))
    assert path.exists() and path.read_text().count("\n") >= lines, ranks.said


def steps_saved(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_sigterm_saves_the_step_and_the_same_command_ends_as_if_never_stopped(times: int, tmp_path: Path) -> None:
    run = tiny(40, checkpoint=Checkpoint(every=1000))
    assert outcome(1, run, tmp_path / "whole", log=tmp_path / "log") == [0]
    rng = random.Random(kill_seed())
    for i in range(times):
        out, log = tmp_path / str(i), tmp_path / f"log-{i}"
        with Ranks(1, run_tiny, run, out, Twist(slow=0.004), log=log) as ranks:
            wait_for(out / "metrics.jsonl", ranks, rng.randint(1, 25))
            ranks.send(rng.choice([signal.SIGTERM, signal.SIGINT]))
            assert ranks.wait() == [75]
        step = len(rows(out / "metrics.jsonl"))
        assert steps_saved(out) == [step] and step < 40
        assert f"stopped by a signal after step {step}; the same command continues" in ranks.said
        assert outcome(1, run, out, log=log) == [0]
        assert left(out) == left(tmp_path / "whole")


def run_in_group(run: Run, out: Path, twist: Twist) -> None:
    """In a process group of its own, which its loader workers will belong to."""
    os.setpgid(0, 0)
    run_tiny(run, out, twist)


def test_a_signal_to_loader_workers_too_does_not_keep_the_run_from_saving(tmp_path: Path) -> None:
    """Ctrl-C and schedulers signal whole groups, mostly while a run waits for slow workers. They change nothing."""
    run, log = tiny(40, checkpoint=Checkpoint(every=1000), log=Log()), tmp_path / "log"
    assert outcome(1, run, tmp_path / "whole", log=log) == [0]
    out, loading = tmp_path / "run", dataclasses.replace(run, data=dataclasses.replace(run.data, workers=2))
    for number, lines in ((signal.SIGTERM, 3), (signal.SIGINT, 9)):
        with Ranks(1, run_in_group, loading, out, Twist(slow=0.01), log=log) as ranks:
            wait_for(out / "metrics.jsonl", ranks, lines)
            os.killpg(ranks.processes[0].pid or 0, number)
            assert ranks.wait() == [75], ranks.said
    assert outcome(1, run, out, log=log) == [0]
    assert left(out) == left(tmp_path / "whole")


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with Ranks(1, run_tiny, tiny(), tmp_path / "run", Twist(at={4: "pause"}), log=tmp_path / "log") as ranks:
        wait_for(tmp_path / "run" / "metrics.jsonl", ranks, 3)
        ranks.send(signal.SIGTERM)
        assert ranks.wait(1) == [None]  # it finishes its step first
        ranks.send(signal.SIGTERM)
        assert ranks.wait() == [-signal.SIGTERM]
    assert steps_saved(tmp_path / "run") == [2]


def build_forever(run: Run, out: Path) -> Job:
    (out / "building").write_text("\n")
    time.sleep(600)
    raise AssertionError


def train_forever(run: Run, out: Path) -> None:
    train(run, partial(build_forever, out=out), out)


def test_sigterm_before_the_first_step_ends_with_the_same_status(tmp_path: Path) -> None:
    with Ranks(1, train_forever, tiny(), tmp_path, log=tmp_path / "log") as ranks:
        wait_for(tmp_path / "building", ranks)
        ranks.send(signal.SIGTERM)
        assert ranks.wait() == [75]


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(tiny(1), partial(build, out=tmp_path), tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# --- several processes ------------------------------------------------------------------------------------------------


def test_a_second_start_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """By all its processes, though only the first asks for the lock."""
    with Ranks(1, run_tiny, tiny(), tmp_path / "run", Twist(at={2: "pause"}), log=tmp_path / "log") as ranks:
        wait_for(tmp_path / "run" / "metrics.jsonl", ranks)
        assert outcome(2, tiny(), tmp_path / "run", log=tmp_path / "second") == [77, 77]
        said = (tmp_path / "second").read_text()
        for rank in (0, 1):
            assert f"rank {rank}: {tmp_path / 'run'} is in use by process {ranks.processes[0].pid} on" in said


def build_slowly(run: Run, out: Path) -> Job:
    """Makes something that takes longer than processes wait for each other otherwise."""
    made = out / "codebook"
    if not made.exists():
        assert os.environ["RANK"] == "0", "another than the first process makes it"
        time.sleep(2.5)
        made.write_text(str(os.getpid()))
    return build(run, out)


def train_after_slow_build(run: Run, out: Path) -> None:
    train(run, partial(build_slowly, out=out), out)


def build_in_vain(run: Run, out: Path) -> Job:
    with (out / "asked").open("a") as file:
        file.write(os.environ["RANK"])
    raise ConfigError("a tokenizer of 9 ids does not fit")


def train_in_vain(run: Run, out: Path) -> None:
    train(run, partial(build_in_vain, out=out), out)


def test_the_first_process_builds_before_the_others_which_wait_longer_than_usual(tmp_path: Path) -> None:
    run = tiny(1, log=Log())
    given = {"environment": {"MULTIWAY_TIMEOUT": "1.5"}, "log": tmp_path / "log"}
    with Ranks(2, train_after_slow_build, run, tmp_path / "run", **given) as ranks:
        assert ranks.wait() == [0, 0], ranks.said
        assert (tmp_path / "run" / "codebook").read_text() == str(ranks.processes[0].pid)


def test_what_the_first_process_cannot_build_ends_all_alike(tmp_path: Path) -> None:
    with Ranks(2, train_in_vain, tiny(1), tmp_path, log=tmp_path / "log") as ranks:
        assert ranks.wait() == [2, 2]
        assert (tmp_path / "asked").read_text() == "0"
        for rank in (0, 1):
            assert f"rank {rank}: a tokenizer of 9 ids does not fit" in ranks.said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_process_the_others_end(number: signal.Signals, tmp_path: Path) -> None:
    """At once when it dies, after the timeout when it hangs; the next start continues."""
    run, out = tiny(2000, checkpoint=Checkpoint(every=4), log=Log()), tmp_path / "run"
    with Ranks(2, run_tiny, run, out, log=tmp_path / "log", environment={"MULTIWAY_TIMEOUT": "4"}) as ranks:
        wait_for(out / "metrics.jsonl", ranks, 5)
        ranks.send(number, [1])
        assert ranks.wait(60, [0])[0] not in (None, 0)
        assert "RuntimeError" in ranks.said
    assert steps_saved(out)[-1] % 4 == 0


@pytest.mark.slow
def test_ranks_of_a_killed_launcher_end_too(tmp_path: Path) -> None:
    """torchrun is killed: none of what it started writes on beside whoever starts the run again."""
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "multiway"]
    sizes = ["--data.images=8", "--data.texts=8", "--data.pairs=8", "--parallel.threads=1", "--steps=100000"]
    command = [sys.executable, "-m", *torchrun, "train", "beit3.quick", f"--out={tmp_path / 'run'}", *sizes]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
    try:
        wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or launcher.poll() is not None)
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(ranks) == 2
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


# --- what crosses between them ----------------------------------------------------------------------------------------


def test_alone_there_is_nothing_to_exchange() -> None:
    alone = parallel.start(None)
    assert (alone.rank, alone.world) == (0, 1)
    assert alone.total([1, 2.5]) == [1, 2.5]
    assert alone.share("x") == ["x"]
    assert alone.together(lambda: 3) == alone.in_turn(lambda: 3) == 3
    with pytest.raises(ConfigError, match="no"):
        alone.together(partial(_refuse, "no"))


def _refuse(message: str) -> None:
    raise ConfigError(message)
