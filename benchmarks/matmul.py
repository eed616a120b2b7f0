"""The share of the machine's own matmul rate that our training step reaches.

    python benchmarks/matmul.py --sizes base --batch 8
    python benchmarks/matmul.py --sizes small base large giant --dtypes bf16 --device cuda

A step is forward, mean square of the final hidden states, backward, on pairs without padding. Useful FLOPs are those
of the linear maps and of attention among real tokens, forward once and backward twice; norms, activations and anything
computed again count nothing. The rate is that of one big square product of the same dtype, taken before every step:
torch's own, by which the floors were set, and for ``fastest`` the faster of that and of `multiway.nn.linear`, since on
some processors torch's fp32 products run at half their rate. On a GPU we know, ``mfu`` is the share of its data sheet's
dense bf16 rate; the optimiser's update is no part of the step. ``spent`` tells what a profiled step went to: where the
gap is. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reference import SIZES, draw, our_pass, place, step
from timing import figure, options, parsed, ratio, report, take_turns
from torch.profiler import ProfilerActivity, profile, record_function

from multiway.engine.profile import export
from multiway.engine.timeline import STEP, summarise
from multiway.nn.linear import linear
from multiway.run import Parallel
from multiway.systems.beit3 import BEiT3, Config

SIDE = {"cpu": 3072, "cuda": 8192}
"""Rows and columns of the product whose rate is the ceiling."""

BATCH = {"tiny": 2, "narrow": 8, "small": 256, "base": 64, "large": 32, "giant": 16}
"""Pairs a GPU step takes."""

PEAK = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s in the makers' data sheets, by a part of the device's name."""


def useful_flops(shape: Config, samples: Sequence[int], pictures: int) -> int:
    """FLOPs of a training step on samples of so many real tokens, ``pictures`` of which are embedded from patches.

    Two per multiplication; a linear map costs its forward twice again in the backward, the first one once (pixels need
    no gradient).
    """
    linear = 2 * (4 * shape.dim**2 + 2 * shape.dim * shape.hidden)  # per token and layer
    attention = [4 * n * n * shape.dim for n in samples]  # scores, and their product with the values
    patches = shape.grid[0] * shape.grid[1] * pictures
    embedding = 2 * 3 * shape.patch**2 * shape.dim * patches
    return 3 * shape.depth * (linear * sum(samples) + sum(attention)) + 2 * embedding


def rates(size: str, dtype: str, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """FLOP/s in every round: useful ones of the ``step``, of torch's big product, ``mm``, and of the ``fastest``; and
    what they are made of."""
    shape = dataclasses.replace(SIZES[size], masked=False)
    batch = args.batch or (BATCH[size] if args.device == "cuda" else 8)
    with torch.device(args.device):
        model = BEiT3(shape)
    model.init_weights()
    place(model, args.device, Parallel(compile=args.compile))
    work = draw("pair", shape, batch, args.device)
    tokens = 1 + shape.grid[0] * shape.grid[1] + work.tokens // batch
    flops = useful_flops(shape, [tokens] * batch, batch)
    side = SIDE[args.device]
    matrix = torch.randn(side, side, device=args.device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    sides = {
        "mm": partial(torch.mm, matrix, matrix),
        "linear": partial(linear, matrix, matrix),
        "step": partial(step, model, our_pass(model, work), dtype, args.device),
    }
    took = take_turns(sides, args)
    facts: dict[str, Any] = {"batch": batch, "flops": flops, "spent": spent(sides["step"], args.device)}
    facts |= {f"{name}_seconds": statistics.median(own) for name, own in took.items()}
    fastest = [min(products) for products in zip(took["mm"], took["linear"], strict=True)]
    products = {"mm": took["mm"], "fastest": fastest}
    found = {name: [2 * side**3 / second for second in own] for name, own in products.items()}
    return found | {"step": [flops / second for second in took["step"]]}, facts


def spent(step: Callable[[], object], device: str) -> dict[str, Any]:
    """Shares of a step's seconds by cause, and the milliseconds of its longest operators."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as profiler, record_function(f"{STEP}1"):
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        found = summarise(export(profiler, Path(folder) / "step.trace.json.gz"), [1])
    shares = {name: round(share, 4) for name, share in found.shares.items() if share > 0}
    return {"shares": shares, "milliseconds": {own.name: round(1000 * own.seconds, 2) for own in found.operators[:8]}}


def peak(device: str) -> float | None:
    """The data sheet's rate of this GPU; None for a processor or one we do not know."""
    if device == "cpu":
        return None
    return next((rate for name, rate in PEAK.items() if name in torch.cuda.get_device_name()), None)


def main() -> None:
    """Every size in every dtype."""
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base"])
    parser.add_argument("--batch", type=int, help="pairs a step, None = 8, on a GPU by size")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    args = parsed(parser)
    figures, facts = {}, {}
    for size in args.sizes:
        for dtype in args.dtypes:
            name = f"{size} {dtype}"
            found, facts[name] = rates(size, dtype, args)
            figures[name] = ratio(found["step"], found["mm"])
            figures[f"{name} fastest"] = ratio(found["step"], found["fastest"])
            if dtype == "bf16" and (rate := peak(args.device)):
                figures[f"{name} mfu"] = figure([own / rate for own in found["step"]])
    report(args, figures, steps=facts)


if __name__ == "__main__":
    main()
