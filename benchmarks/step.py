"""Our training step beside torchscale's BEiT-3: the same weights, the same batch, one process, taken in turns.

    python benchmarks/step.py --size small --clock cpu          # a busy machine: CPU seconds of one thread
    python benchmarks/step.py --size base --batch 8 --repeats 7 # a quiet one: wall seconds, all threads
    python benchmarks/step.py --size base --device cuda --batch 64

A step is forward, mean square of the final hidden states, backward; heads and optimiser are left out, they are the same
work on both sides. Not quite the optimiser in bf16 on CPUs: our engine has gradients stay in bf16 until it casts them,
autocast casts them before; ``--update`` has both sides clip and take AdamW's step as well. Before anything is timed the
outputs must agree to 1e-4 in fp32. A figure is reference / ours: 2 is twice as fast. The last line is one JSON object.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
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
from torch import nn

from multiway.engine.optim import AdamW, total_norm, update
from multiway.run import Optim, Parallel

RATE, CLIP = 1e-6, 3.0
"""Of updates: so small that the batch is never learned."""


def whole_step(model: nn.Module, ours: bool, *work: object) -> Callable[[], None]:
    """A function that takes a `step` and moves the weights: as anybody does with torch, or as our engine does."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        AdamW([{"params": weights, "scale": 1.0}], Optim()) if ours else torch.optim.AdamW(weights, RATE, fused=True)
    )

    def taken() -> None:
        step(model, *work)  # type: ignore[arg-type]
        if ours:
            update([optimizer], RATE, float(total_norm(model)), CLIP)
        else:
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()

    return taken


def main() -> None:
    """Compare every setting in every dtype."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--image-px", type=int, help="side of the pictures, None = the size's own")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["image", "pair", "caption"])
    parser.add_argument("--compile", action="store_true", help="torch.compile each of our blocks")
    parser.add_argument("--update", action="store_true", help="clip and take AdamW's step as well")
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
            whole = whole_step if args.update else lambda model, _, *work: partial(step, model, *work)
            sides = {
                "reference": whole(reference, False, theirs, dtype, args.device),
                "ours": whole(ours, True, own, dtype, args.device),
            }
            took = take_turns(sides, args, peers=["reference"])
            figures[f"{setting} {dtype}"] = ratio(took["reference"], took["ours"])
            facts[setting][dtype] = {f"{side}_seconds": statistics.median(own) for side, own in took.items()}
    report(args, figures, peer=peer(), work=facts)


if __name__ == "__main__":
    main()
