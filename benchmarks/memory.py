"""Peak memory of our training step as a share of torchscale's BEiT-3, with and without recomputing our blocks.

    python benchmarks/memory.py --size base --batch 8

The peak is what a step of caption pairs needs above the model at rest, gradients included, in a process of its own per
side. ``plain`` keeps all activations on both sides; ``recompute`` has every block of ours run again in the backward
pass, against the plain reference. 0.5 is half of the reference's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from reference import SIZES, build_ours, build_reference, comparable, draw, our_pass, peer, reference_pass, step
from timing import options, parsed, ratio, report

from multiway.run import Parallel

SIDES = ("reference", "plain", "recompute")


def peaks(args: argparse.Namespace) -> list[float]:
    """MB each of several steps of one side needs above the model at rest."""
    shape, [dtype] = comparable(args.size), args.dtypes
    model = build_reference(shape, args.device)
    work = draw("caption", shape, args.batch, args.device)
    if args.side == "reference":
        run = reference_pass(model, work)
    else:
        recompute = shape.depth if args.side == "recompute" else 0
        model = build_ours(shape, model, args.device, Parallel(recompute=recompute))
        run = our_pass(model, work)
    measure = peak_of_cuda if args.device == "cuda" else peak_of_process
    step(model, run, dtype, args.device)  # kernels and thread pools exist from here on
    found = []
    for _ in range(args.repeats):
        model.zero_grad(set_to_none=True)
        found.append(measure(lambda: step(model, run, dtype, args.device)))
    return found


def peak_of_cuda(work: Callable[[], object]) -> float:
    """MB that ``work`` takes at its most on the device."""
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - rest) / 2**20


def peak_of_process(work: Callable[[], object]) -> float:
    """MB of resident memory that ``work`` takes at its most."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    rest = status_kb("VmRSS")
    work()
    return (status_kb("VmHWM") - rest) / 2**10


def status_kb(name: str) -> int:
    """A field of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def child(args: argparse.Namespace, dtype: str, side: str) -> list[float]:
    """`peaks` in a process whose heap gives every freed tensor back: peaks, not fragmentation."""
    flags = {"dtypes": dtype, "side": side, **{name: getattr(args, name) for name in ("size", "device", "batch")}}
    flags |= {"repeats": args.repeats, "threads": args.threads}
    command = [sys.executable, "-W", "ignore", __file__]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Compare both of ours with the reference in every dtype."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parsed(parser)
    if args.side:
        print(json.dumps(peaks(args)))
        return
    figures, facts = {}, {}
    for dtype in args.dtypes:
        found = {side: child(args, dtype, side) for side in SIDES}
        for side in ("plain", "recompute"):
            figures[f"{side} {dtype}"] = ratio(found[side], found["reference"])
        facts[dtype] = {f"{side}_mb": round(statistics.median(values)) for side, values in found.items()}
    report(args, figures, peer=peer(), memory=facts)


if __name__ == "__main__":
    main()
