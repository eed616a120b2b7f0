"""Training in processes of their own, forked from a clean one that has already imported everything: quick to start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - FSDP imports it at its first use, which takes seconds

from multiway.engine import checkpoint
from multiway.engine.train import train
from multiway.errors import MultiwayError
from multiway.run import Run
from tests.engine.tiny import PLAIN, Twist, build

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Crash:
    """Die by SIGKILL at a named point of the ``save``-th save (from 1), on ``rank``."""

    point: str
    save: int = 1
    rank: int = 0


def run_tiny(run: Run, out: Path, twist: Twist = PLAIN, crash: Crash | None = None, **options: Any) -> None:
    """Train a tiny run; what ``multiway train`` does with an error, the caller does."""
    if crash is not None and int(os.environ["RANK"]) == crash.rank:
        saves = 0

        def at(point: str) -> None:
            nonlocal saves
            saves += point == crash.point
            if saves == crash.save:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._at = at
    train(run, partial(build, out=out, twist=twist), out, **options)


class Ranks:
    """``world`` processes that call ``work(*arguments, **options)`` as ranks of one group; what is left is killed.

    ``environment``: more variables for all. What they print is in ``said``.
    """

    def __init__(
        self, world: int, work: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None,
        log: Path, **options: Any,
    ) -> None:  # fmt: skip
        self.log = log
        shared = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            **(environment or {}),
        }
        self.processes = []
        for rank in range(world):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(FORKS.Process(target=_child, args=(work, arguments, options, own, log)))
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, None = all, as long as they live."""
        for process in self.processes if ranks is None else [self.processes[rank] for rank in ranks]:
            if process.is_alive():
                os.kill(process.pid or 0, number)

    def wait(self, seconds: float = 120, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Exit status of some ranks, None = all: minus the signal one died of, None for one that still runs then."""
        waited = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        end = time.monotonic() + seconds
        for process in waited:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in waited]

    @property
    def said(self) -> str:
        """All that was printed to this log."""
        return self.log.read_text()


def kill_seed() -> int:
    """Seed of a test's random instants, printed; to repeat one, set ``KILL_SEED``."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 1_000_000))
    print(f"KILL_SEED={seed}")
    return seed


def outcome(world: int, *arguments: Any, log: Path, **options: Any) -> list[int | None]:
    """Exit status of every rank of a tiny run."""
    with Ranks(world, run_tiny, *arguments, log=log, **options) as ranks:
        return ranks.wait()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _child(
    work: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any], own: dict[str, str], log: Path
) -> None:
    os.environ.update(own)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a process of its own
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        work(*arguments, **options)
    except MultiwayError as error:
        print(f"rank {own['RANK']}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
