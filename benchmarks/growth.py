"""How the time of a training step grows with tokens and with the batch: ours, and torchscale's beside it.

    python benchmarks/growth.py

Width 384, 4 layers, pairs without padding: 261, 641 and 1,089 tokens are pictures of 224, 384 and 512 pixels with 64
words; the batch grows from 2 to 8 at 261 tokens. A figure is the slope of log time over log size: 1 is proportional,
and since attention is quadratic, slightly above 1 is all that tokens allow. The last line is one JSON object.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

from reference import (
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
from timing import figure, options, parsed, report, take_turns

PIXELS = {261: 224, 641: 384, 1089: 512}
POINTS = ((261, 2), (641, 2), (1089, 2), (261, 8))
"""Tokens of a sample and samples, of every point that is timed."""

SLOPES = {
    "tokens 261-641": ((261, 2), (641, 2)),
    "tokens 641-1089": ((641, 2), (1089, 2)),
    "batch 2-8": ((261, 2), (261, 8)),
}

Side = tuple[str, tuple[int, int]]


def points(size: str, dtype: str, device: str) -> dict[Side, Callable[[], object]]:
    """The step of either side at every point."""
    sides: dict[Side, Callable[[], object]] = {}
    for tokens, pixels in PIXELS.items():
        shape = comparable(size, pixels)
        reference = build_reference(shape, device)
        ours = build_ours(shape, reference, device)
        for point in (point for point in POINTS if point[0] == tokens):
            work = draw("pair", shape, point[1], device)
            theirs, own = reference_pass(reference, work), our_pass(ours, work)
            check_equal(f"{tokens} tokens", real_rows(theirs(), work).detach(), own().detach())
            sides["reference", point] = partial(step, reference, theirs, dtype, device)
            sides["ours", point] = partial(step, ours, own, dtype, device)
    return sides


def main() -> None:
    """Time every point in turns, and take the slopes round by round."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=SIZES, default="narrow")
    args = parsed(parser)
    figures, facts = {}, {}
    for dtype in args.dtypes:
        took = take_turns(points(args.size, dtype, args.device), args)
        facts[dtype] = {f"{side} {n} x {batch}": statistics.median(own) for (side, (n, batch)), own in took.items()}
        for name, (small, large) in SLOPES.items():
            factor = large[0] * large[1] / (small[0] * small[1])
            for side in ("ours", "reference"):
                rounds = zip(took[side, small], took[side, large], strict=True)
                slopes = [math.log(after / before, factor) for before, after in rounds]
                figures[f"{side} {name} {dtype}"] = figure(slopes)
    report(args, figures, peer=peer(), seconds=facts)


if __name__ == "__main__":
    main()
