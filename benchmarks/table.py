"""Every figure of speed we promise, measured, beside its floor and its goal.

    python benchmarks/table.py                  # under 15 minutes on two cores: make bench
    python benchmarks/table.py --full --record  # every row at full size: make bench-full
    python benchmarks/table.py --device cuda    # what a GPU can show, in under 10 minutes (with --check: does it run?)

Each script runs in a process of its own and prints one line of JSON; here they are put into one table. A row is
"below" when it misses its floor, else "floor" or "goal"; where the goal is smaller than the floor, less is better.
``--record`` writes everything to ``results/DEVICE-MODE-DATE.json``. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"


@dataclass(frozen=True)
class Call:
    """One call of one script: its arguments by mode."""

    file: str
    quick: str = ""
    full: str = ""
    check: str = "--size tiny"
    cuda: str = ""


@dataclass(frozen=True)
class Goal:
    """One line of the table: a figure that one call prints, the least we accept and what we promise."""

    row: int
    quantity: str
    call: str
    figure: str
    floor: float
    goal: float

    def verdict(self, median: float) -> str:
        """goal, floor or below."""
        sign = 1 if self.goal >= self.floor else -1
        if sign * median >= sign * self.goal:
            return "goal"
        return "floor" if sign * median >= sign * self.floor else "below"


CALLS = {
    "pairs": Call(
        "step.py",
        quick="--size base --batch 4 --settings caption pair",
        full="--size base --batch 8 --settings caption pair",
        check="--size tiny --batch 2 --settings caption pair",
        cuda="--size base --batch 64 --settings caption pair",
    ),
    "long": Call(
        "step.py",
        quick="--size narrow --image-px 512 --batch 2 --settings pair",
        full="--size narrow --image-px 512 --batch 4 --settings pair",
        check="--size tiny --image-px 512 --batch 2 --settings pair",
        cuda="--size narrow --image-px 512 --batch 64 --settings pair",
    ),
    "pretrain": Call(
        "pretrain.py",
        quick="--size base --batch 4",
        full="--size base --batch 8",
        check="--size tiny --batch 1",
        cuda="--size base --batch 64",
    ),
    "texts": Call(
        "step.py",
        quick="--size small --batch 32 --settings text uniform",
        full="--size base --batch 32 --settings text uniform",
        check="--size tiny --batch 4 --settings text uniform",
        cuda="--size base --batch 256 --settings text uniform",
    ),
    "memory": Call(
        "memory.py",
        quick="--size small --batch 8",
        full="--size base --batch 8",
        check="--size tiny --batch 2",
        cuda="--size base --batch 64",
    ),
    "matmul": Call(
        "matmul.py",
        quick="--sizes base --batch 4",
        full="--sizes base --batch 8",
        check="--sizes tiny base --batch 1",
        cuda="--sizes small base large giant --dtypes bf16",
    ),
    "growth": Call("growth.py"),
    "loader": Call("loader.py", quick="--pictures 200", check="--pictures 20"),
    "embed": Call("embed.py", check="--size tiny --texts 20"),
    "start": Call("start.py", full="--repeats 40"),
    "giant": Call("step.py", cuda="--size giant --batch 8 --settings caption --dtypes bf16"),
}

GOALS = (
    Goal(1, "pair step, captions, fp32", "pairs", "caption fp32", 1.25, 1.42),
    Goal(1, "pair step, captions, bf16", "pairs", "caption bf16", 1.25, 1.60),
    Goal(2, "pair step, no padding, fp32", "pairs", "pair fp32", 1.0, 1.10),
    Goal(2, "pair step, no padding, bf16", "pairs", "pair bf16", 1.15, 1.35),
    Goal(3, "pair step, 1,089 tokens, fp32", "long", "pair fp32", 1.4, 1.5),
    Goal(3, "pair step, 1,089 tokens, bf16", "long", "pair bf16", 1.4, 1.5),
    Goal(4, "masked pre-training, online tokenizer, fp32", "pretrain", "online fp32", 1.7, 2.0),
    Goal(4, "masked pre-training, online tokenizer, bf16", "pretrain", "online bf16", 1.7, 2.0),
    Goal(4, "masked pre-training, cached codes, fp32", "pretrain", "cached fp32", 1.35, 1.55),
    Goal(4, "masked pre-training, cached codes, bf16", "pretrain", "cached bf16", 1.35, 1.55),
    Goal(5, "text step, captions, fp32", "texts", "text fp32", 3.5, 4.5),
    Goal(5, "text step, captions, bf16", "texts", "text bf16", 3.5, 4.5),
    Goal(5, "text step, 8 to 128 tokens, fp32", "texts", "uniform fp32", 1.5, 1.68),
    Goal(5, "text step, 8 to 128 tokens, bf16", "texts", "uniform bf16", 1.5, 1.68),
    Goal(6, "peak memory, all kept, fp32", "memory", "plain fp32", 0.75, 0.55),
    Goal(6, "peak memory, all kept, bf16", "memory", "plain bf16", 0.75, 0.55),
    Goal(6, "peak memory, blocks recomputed, fp32", "memory", "recompute fp32", 0.5, 0.35),
    Goal(6, "peak memory, blocks recomputed, bf16", "memory", "recompute bf16", 0.5, 0.35),
    Goal(7, "share of torch's matmul rate, fp32", "matmul", "base fp32", 0.83, 0.90),
    Goal(7, "share of torch's matmul rate, bf16", "matmul", "base bf16", 0.62, 0.74),
    Goal(7, "share of the fastest matmul rate, fp32", "matmul", "base fp32 fastest", 0.83, 0.90),
    Goal(7, "share of the fastest matmul rate, bf16", "matmul", "base bf16 fastest", 0.62, 0.74),
    *(
        Goal(8, f"growth, {name}, {dtype}", "growth", f"ours {name} {dtype}", floor, goal)
        for name, floor, goal in (
            ("tokens 261-641", 1.15, 1.08),
            ("tokens 641-1089", 1.40, 1.25),
            ("batch 2-8", 1.0, 0.95),
        )
        for dtype in ("fp32", "bf16")
    ),
    Goal(9, "loader, 256 px, Pillow", "loader", "256x256 pillow", 1.5, 2.2),
    Goal(9, "loader, 500x375, Pillow", "loader", "500x375 pillow", 1.5, 2.2),
    Goal(9, "loader, 256 px, simplejpeg", "loader", "256x256 simplejpeg", 2.0, 3.0),
    Goal(9, "loader, 500x375, simplejpeg", "loader", "500x375 simplejpeg", 2.0, 3.0),
    Goal(10, "text embedding, CLIP padded, fp32", "embed", "padded fp32", 4.0, 5.0),
    Goal(10, "text embedding, CLIP padded, bf16", "embed", "padded bf16", 4.0, 5.0),
    Goal(10, "text embedding, CLIP sorted, fp32", "embed", "sorted fp32", 1.0, 1.1),
    Goal(10, "text embedding, CLIP sorted, bf16", "embed", "sorted bf16", 1.0, 1.1),
    Goal(11, "import multiway, seconds", "start", "import", 0.2, 0.1),
    Goal(11, "training loop over bare step, %", "start", "loop", 3.0, 1.0),
    Goal(12, "MFU, small", "matmul", "small bf16 mfu", 0.20, 0.30),
    Goal(12, "MFU, base", "matmul", "base bf16 mfu", 0.33, 0.42),
    Goal(12, "MFU, large", "matmul", "large bf16 mfu", 0.40, 0.48),
    Goal(12, "MFU, 1.9 B", "matmul", "giant bf16 mfu", 0.45, 0.52),
    Goal(12, "pair step on a GPU, base, bf16", "pairs", "caption bf16", 1.8, 2.7),
    Goal(12, "pair step on a GPU, 1.9 B, bf16", "giant", "caption bf16", 1.6, 2.2),
)
"""Floors fail a release, goals are what the README promises; both were set from measured peers and prototypes."""

COMPILED = ("step.py", "pretrain.py", "matmul.py")
GPU_ROWS = (*range(1, 7), 12)
"""What a GPU is asked for; the last of them it alone can show."""


def wanted(mode: str, rows: list[int]) -> dict[str, list[Goal]]:
    """The lines of the table by call, for the calls a mode makes."""
    found: dict[str, list[Goal]] = {}
    for goal in GOALS:
        in_mode = goal.row in GPU_ROWS if mode == "cuda" else goal.row != GPU_ROWS[-1]
        if in_mode and goal.row in (rows or [goal.row]):
            found.setdefault(goal.call, []).append(goal)
    return found


def run(name: str, mode: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """What a script says in its last line; None when it failed, having said why on standard error."""
    words = getattr(CALLS[name], "check" if args.mode == "check" else mode).split()
    if args.repeats and "--repeats" not in words:
        words += ["--repeats", str(args.repeats)]
    words += ["--device", args.device] if args.device != "cpu" else []
    words += ["--clock", args.clock] if args.clock != "wall" else []
    words += ["--threads", str(args.threads)] if args.threads else []
    words += ["--compile"] if args.compile and CALLS[name].file in COMPILED else []
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", str(HERE / CALLS[name].file), *words]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}  # the engine takes a GPU where it sees one
    env = os.environ | {"PYTHONPATH": path} | hidden
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{' '.join(command[3:])} ended with status {done.returncode}", file=sys.stderr)
        return None
    return {"arguments": words, **json.loads(done.stdout.splitlines()[-1])}


def lines(goals: list[Goal], result: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The table's lines for the result of one call."""
    figures = (result or {}).get("figures", {})
    for goal in goals:
        found = figures.get(goal.figure)
        line: dict[str, Any] = {"row": goal.row, "quantity": goal.quantity, "floor": goal.floor, "goal": goal.goal}
        yield {**line, **(found or {}), "verdict": goal.verdict(found["median"]) if found else "not measured"}


def shown(line: dict[str, Any]) -> str:
    """A line for people."""
    text = f"{line['row']:3}  {line['quantity']:45}"
    if "median" in line:
        text += f"{line['median']:8.3f}   {line['low']:.3f} to {line['high']:.3f}".ljust(34)
    return f"{text:85}{line['floor']:7.2f}{line['goal']:7.2f}  {line['verdict']}"


def commit() -> str | None:
    """The commit that is measured, with "-dirty" where files were changed since; None outside of git."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(asked, cwd=HERE, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:  # no git
        return None


def record(result: dict[str, Any]) -> None:
    """Write the results under the device's name, the mode and today's date."""
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    path = HERE / "results" / f"{device}-{result['mode']}-{result['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Run what the mode asks for, script by script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", dest="mode", action="store_const", const="quick", default="quick")
    modes.add_argument("--full", dest="mode", action="store_const", const="full")
    modes.add_argument("--check", dest="mode", action="store_const", const="check", help="toy sizes: does it run?")
    parser.add_argument("--rows", nargs="+", type=int, default=[], help="only these rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds of one thread")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, help="rounds of every script, None = its own choice")
    parser.add_argument("--compile", action="store_true", help=f"our blocks, in {', '.join(COMPILED)}")
    parser.add_argument("--record", action="store_true", help="write results/DEVICE-MODE-DATE.json")
    args = parser.parse_args()
    mode = "cuda" if args.device == "cuda" else args.mode
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    said = "check" if args.mode == "check" else mode
    result: dict[str, Any] = {"benchmark": "table", "mode": said, "date": date, "commit": commit(), "device": ""}
    result["table"] = []
    calls: dict[str, Any] = {}
    print(f"row  {'quantity':45}{'median':>8}   {'least to greatest round':25}{'floor':>6}{'goal':>7}")
    for name, goals in wanted(mode, args.rows).items():
        begun = time.monotonic()
        calls[name] = run(name, mode, args)
        own = list(lines(goals, calls[name]))
        result["table"] += own
        result["device"] = (calls[name] or {}).get("device", result["device"])
        if args.record and result["device"]:
            record({**result, "calls": calls})
        took = f"     {CALLS[name].file} {getattr(CALLS[name], mode)}  [{time.monotonic() - begun:.0f} s]"
        print("\n".join([took, *map(shown, own)]), flush=True)
    print(json.dumps(result))
    if None in calls.values():
        sys.exit(1)


if __name__ == "__main__":
    main()
