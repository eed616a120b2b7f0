"""What the benchmarks share: their options, taking turns, figures with their spread, and the JSON line at the end."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from multiway.engine.heap import keep_freed_memory

DTYPES = ("fp32", "bf16")
STEPS_PER_TURN = {"cpu": 1, "cuda": 5}
"""A device that runs behind its host is waited for once in so many steps."""

TURN_SECONDS = 0.5
"""How long a side with a process of its own is at work in its turn, or one step: it begins with the other's cache."""

Figure = dict[str, float]
S = TypeVar("S")


def options(text: str | None) -> argparse.ArgumentParser:
    """The options every script takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(STEPS_PER_TURN), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds of one thread")
    parser.add_argument(
        "--heap", choices=("own", "same"), default="own", help="same: freed memory is kept for peers too"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count; one before them warms up")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; where sides are to be forked, this process keeps to one thread and lets the heap be."""
    args = parser.parse_args()
    if args.clock == "cpu":
        args.threads = 1
    if args.device != "cpu":
        args.heap = "same"
    forks = args.heap == "own" and getattr(args, "side", None) is None  # one side alone is a child that forks none
    torch.set_num_threads(1 if forks else args.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in the reference's convolutions too
    torch.backends.cudnn.deterministic = True  # codes that are made twice are the same
    return args


def autocast(dtype: str, device: str) -> torch.autocast:
    """Matrix products in ``dtype``, the same way for ours and the peers."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16")


def seconds(work: Callable[[], object], device: str, clock: str, steps: int = 1) -> float:
    """Seconds of one call of ``work``, the mean of ``steps``."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    begun = now()
    for _ in range(steps):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - begun) / steps


def work_apart(work: Callable[[], object], ours: bool, args: argparse.Namespace, asked: Connection) -> None:
    """Tell the seconds of one call of ``work`` as often as asked for, the mean of as many as fill a turn."""
    torch.set_num_threads(args.threads)
    if ours:
        keep_freed_memory()
    steps = 1
    while asked.recv():
        took = seconds(work, args.device, args.clock, steps)
        steps = max(1, round(TURN_SECONDS / took))
        asked.send(took)


def take_turns(
    sides: Mapping[S, Callable[[], object]], args: argparse.Namespace, peers: Collection[S] = ()
) -> dict[S, list[float]]:
    """Seconds of every side in every round, one after the other; the first round warms up and is left out.

    ``peers``: where there are some, ``--heap own`` has every side in a process of its own, the peers' with the C
    library as it is, ours with freed memory kept, as our engine has it.
    """
    if peers and args.heap == "own":
        return turns_apart(sides, args, peers)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    took: dict[S, list[float]] = {side: [] for side in sides}
    for turn in range(args.repeats + 1):
        for side, work in sides.items():
            own = seconds(work, args.device, args.clock, STEPS_PER_TURN[args.device])
            took[side] += [own] if turn else []
    return took


def turns_apart(
    sides: Mapping[S, Callable[[], object]], args: argparse.Namespace, peers: Collection[S]
) -> dict[S, list[float]]:
    """`take_turns` of sides in processes of their own, forked, so this one must not have used several threads."""
    took: dict[S, list[float]] = {side: [] for side in sides}
    fork, ask = multiprocessing.get_context("fork"), {}
    for side, work in sides.items():
        ask[side], asked = fork.Pipe()
        fork.Process(target=work_apart, args=(work, side not in peers, args, asked), daemon=True).start()
        asked.close()  # theirs now: if they end, we are told
    for turn in range(args.repeats + 1):
        for side, own in ask.items():
            own.send(True)
            told = own.recv()
            took[side] += [told] if turn else []
    for own in ask.values():
        own.send(False)
    return took


def figure(values: Sequence[float]) -> Figure:
    """Median of the rounds, with the least and the greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """`figure` of the quotients round by round."""
    return figure([a / b for a, b in zip(above, below, strict=True)])


def device_name(device: str) -> str:
    """What the machine calls its GPU, or its processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(args: argparse.Namespace, figures: Mapping[str, Figure], **facts: object) -> None:
    """Print the figures for people, then everything as one line of JSON."""
    for name, own in figures.items():
        print(f"{name:40}{own['median']:9.3f}   ({own['low']:.3f} to {own['high']:.3f}, {own['rounds']} rounds)")
    result = {
        "benchmark": Path(sys.argv[0]).stem,
        "device": device_name(args.device),
        "torch": torch.__version__,
        "settings": vars(args),
        **facts,
        "figures": figures,
    }
    print(json.dumps(result))
