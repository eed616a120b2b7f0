"""Our training step beside torchscale's BEiT-3: the same weights, the same batch, one process, taken in turns.

    python benchmarks/step.py --size small --clock cpu          # a busy machine: CPU seconds of one thread
    python benchmarks/step.py --size base --batch 8 --repeats 7 # a quiet one: wall seconds, all threads
    python benchmarks/step.py --size base --device cuda --batch 64

A step is forward, mean square of the final hidden states, backward; heads and optimiser are left out, they are the same
work on both sides. Before anything is timed the outputs must agree to 1e-4 in fp32. A figure is reference / ours, so 2
is twice as fast. The last line is one JSON object.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from reference import (
    SETTINGS,
    SIZES,
    build_ours,
    build_reference,
    check_equal,
    comparable,
    draw,
    our_pass,
    peer,
    real_rows,
    reference_pass,
    step,
)
from timing import options, parsed, ratio, report, take_turns

from multiway.run import Parallel


def main() -> None:
    """Compare every setting in every dtype."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--image-px", type=int, help="side of the pictures, None = the size's own")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["image", "pair", "caption"])
    parser.add_argument("--compile", action="store_true", help="torch.compile each of our blocks")
    args = parsed(parser)
    shape = comparable(args.size, args.image_px)
    reference = build_reference(shape, args.device)
    ours = build_ours(shape, reference, args.device, Parallel(compile=args.compile))
    figures, facts = {}, {}
    for setting in args.settings:
        work = draw(setting, shape, args.batch, args.device)
        theirs, own = reference_pass(reference, work), our_pass(ours, work)
        with torch.no_grad():
            apart = check_equal(setting, real_rows(theirs(), work), own())
        facts[setting] = {"apart": apart, "text_tokens": work.tokens}
        for dtype in args.dtypes:
            sides = {
                "reference": partial(step, reference, theirs, dtype, args.device),
                "ours": partial(step, ours, own, dtype, args.device),
            }
            took = take_turns(sides, args, peers=["reference"])
            figures[f"{setting} {dtype}"] = ratio(took["reference"], took["ours"])
            facts[setting][dtype] = {f"{side}_seconds": statistics.median(own) for side, own in took.items()}
    report(args, figures, peer=peer(), work=facts)


if __name__ == "__main__":
    main()
