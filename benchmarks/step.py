"""Our training step beside torchscale's BEiT-3: the same weights, the same batch, one process, taken in turns.

    python benchmarks/step.py --size small --clock cpu          # a busy machine: CPU seconds of one thread
    python benchmarks/step.py --size base --batch 8 --repeats 7 # a quiet one: wall seconds, all threads
    python benchmarks/step.py --size base --device cuda --batch 64

A step is forward, mean square of the final hidden states, backward; heads and optimiser are left out, they are the same
work on both sides. Before anything is timed the outputs must agree to 1e-5 in fp32. Peak memory is what a step needs
above the model at rest, gradients included, measured in a process per side. "faster" is the median over the turns of
reference / ours, "of it" is our peak as a share of the reference's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # dim, depth, heads
SETTINGS = ("image", "pair", "caption")
DTYPES = ("fp32", "bf16")
IMAGE_PX, PATCH, VOCAB, TEXT = 224, 16, 64010, 64
CAPTION = (9, 21)  # shortest and longest caption in tokens with <s> and </s>: 14 on average, as COCO's
TOLERANCE = 1e-5


def build_reference(size: str) -> nn.Module:
    """torchscale's BEiT-3 with seeded weights, all of them random."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    dim, depth, heads = SIZES[size]
    config = EncoderConfig(
        multiway=True,
        no_output_layer=True,
        encoder_embed_dim=dim,
        encoder_layers=depth,
        encoder_attention_heads=heads,
        encoder_ffn_embed_dim=4 * dim,
        img_size=IMAGE_PX,
        patch_size=PATCH,
        vocab_size=VOCAB,
    )
    torch.manual_seed(0)
    model = BEiT3(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def build_ours(size: str, reference: nn.Module) -> nn.Module:
    """Our model with the reference's weights."""
    from multiway.systems.beit3 import WEIGHTS, BEiT3, Config
    from multiway.weights.rename import to_ours

    dim, depth, heads = SIZES[size]
    model = BEiT3(Config(dim=dim, depth=depth, heads=heads, hidden=4 * dim, masked=False))
    theirs = {f"beit3.{name}": value for name, value in reference.state_dict().items()}
    model.load_state_dict(to_ours(theirs, WEIGHTS, model.state_dict()))
    return model


def draw_batch(setting: str, batch: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Pixels uint8 (B, 3, H, W), ids (B, 64) and pad (B, 64); texts are None for images alone."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (batch, 3, IMAGE_PX, IMAGE_PX), generator=generator, dtype=torch.uint8)
    if setting == "image":
        return pixels, None, None
    ids = torch.randint(4, VOCAB, (batch, TEXT), generator=generator)
    lengths = torch.full((batch,), TEXT)
    if setting == "caption":
        draws = torch.randint(CAPTION[0], CAPTION[1], (3, batch), generator=generator).float()
        lengths = draws.mean(0).round().long()
    return pixels, ids, torch.arange(TEXT) >= lengths[:, None]


def reference_pass(model: nn.Module, setting: str, batch: int, device: str) -> Callable[[], Tensor]:
    """A function that returns the reference's final hidden states (B, N, D); it pads every text to 64 as released."""
    pixels, ids, pad = draw_batch(setting, batch)
    pixels = (pixels.float() / 127.5 - 1).to(device)
    ids, pad = (None if x is None else x.to(device) for x in (ids, pad))
    if setting == "pair":
        pad = None
    return lambda: model(textual_tokens=ids, visual_tokens=pixels, text_padding_position=pad)["encoder_out"]


def our_pass(model: nn.Module, setting: str, batch: int, device: str) -> Callable[[], Tensor]:
    """A function that returns our final hidden states (R, D), one row per real token."""
    from multiway.plan import make_plan

    pixels, ids, pad = draw_batch(setting, batch)
    lengths: dict[str, list[int]] = {"image": [1 + (IMAGE_PX // PATCH) ** 2] * batch}
    text = None
    if ids is not None and pad is not None:
        lengths["text"] = (~pad).sum(1).tolist()
        text = ids[~pad].to(device)
    plan = make_plan({"image" if text is None else "pair": lengths}).to(device)
    pixels = pixels.to(device)
    return lambda: model(plan, image=pixels, text=text).values


def difference(reference: Tensor, ours: Tensor, setting: str, batch: int) -> float:
    """Largest difference at the real tokens."""
    _, _, pad = draw_batch(setting, batch)
    images = 1 + (IMAGE_PX // PATCH) ** 2
    real = [reference[:, :images].flatten(0, 1)]
    if pad is not None:
        real.append(reference[:, images:][~pad.to(reference.device)])
    return float((torch.cat(real) - ours).abs().max())


def step(model: nn.Module, run: Callable[[], Tensor], dtype: str, device: str) -> None:
    """One training step without the optimiser; gradients are left in place."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16"):
        out = run()
    out.float().square().mean().backward()


@contextmanager
def stopwatch(clock: str, device: str) -> Iterator[list[float]]:
    """Seconds spent inside, appended to the list it hands out."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    took: list[float] = []
    start = now()
    yield took
    if device == "cuda":
        torch.cuda.synchronize()
    took.append(now() - start)


def measure_time(args: argparse.Namespace) -> list[dict]:
    """Time every setting in one dtype, reference and ours in turns."""
    reference = build_reference(args.size)
    ours = build_ours(args.size, reference).to(args.device)
    reference.to(args.device)
    rows = []
    for setting in args.settings:
        run_reference = reference_pass(reference, setting, args.batch, args.device)
        run_ours = our_pass(ours, setting, args.batch, args.device)
        with torch.no_grad():
            apart = difference(run_reference(), run_ours(), setting, args.batch)
        if args.device == "cpu" and apart > TOLERANCE:
            raise SystemExit(f"outputs of {setting} differ by {apart:.2e}: the comparison would be void")
        sides = {"reference": (reference, run_reference), "ours": (ours, run_ours)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(args.repeats + 1):  # the first is to warm up
            for side, (model, run) in sides.items():
                with stopwatch(args.clock, args.device) as took:
                    step(model, run, args.dtype, args.device)
                if turn:
                    seconds[side] += took
        for model, _ in sides.values():
            model.zero_grad(set_to_none=True)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        faster = statistics.median(theirs / own for theirs, own in zip(*seconds.values(), strict=True))
        rows.append({"setting": setting, "dtype": args.dtype, "faster": faster, "output_difference": apart, **medians})
    return rows


def measure_memory(args: argparse.Namespace) -> float:
    """MB a step of one side needs above the model at rest."""
    model = build_reference(args.size)
    if args.side == "ours":
        model = build_ours(args.size, model)
    model.to(args.device)
    make_pass = our_pass if args.side == "ours" else reference_pass
    run = make_pass(model, args.settings[0], args.batch, args.device)
    step(model, run, args.dtype, args.device)  # kernels and thread pools exist from here on
    model.zero_grad(set_to_none=True)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        step(model, run, args.dtype, args.device)
        return (torch.cuda.max_memory_allocated() - rest) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    rest = status_kb("VmRSS")
    step(model, run, args.dtype, args.device)
    return (status_kb("VmHWM") - rest) / 2**10


def status_kb(name: str) -> int:
    """A field of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def child(args: argparse.Namespace, *more: str) -> object:
    """Run a part of the benchmark in a process of its own, where stubs stand in for what torchscale needs not."""
    flags = {name: getattr(args, name) for name in ("size", "device", "batch", "repeats", "clock", "threads")}
    command = [sys.executable, "-W", "ignore::FutureWarning", __file__, *more]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "parity" / "stubs"), str(ROOT / "src")])}
    if "memory" in more:
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc then returns every freed tensor: peaks, not fragmentation
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> dict:
    """All settings in all dtypes."""
    rows = []
    print(f"{'':14}{'reference s':>12}{'ours s':>9}{'faster':>8}{'reference MB':>14}{'ours MB':>9}{'of it':>7}")
    for dtype in args.dtypes:
        for row in child(args, "--part", "time", "--dtype", dtype, "--settings", *args.settings):  # type: ignore[attr-defined]
            for side in ("reference", "ours") if args.memory else ():
                more = ("--part", "memory", "--side", side, "--dtype", dtype, "--settings", row["setting"])
                row[f"{side}_mb"] = child(args, *more)
            row["memory"] = row["ours_mb"] / row["reference_mb"] if args.memory else None
            rows.append(row)
            line = f"{row['setting']:8}{dtype:6}{row['reference']:12.3f}{row['ours']:9.3f}{row['faster']:8.2f}"
            if args.memory:
                line += f"{row['reference_mb']:14.0f}{row['ours_mb']:9.0f}{row['memory']:7.2f}"
            print(line, flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return {
        "benchmark": "step",
        "peer": f"torchscale {importlib.metadata.version('torchscale')}",
        "torch": torch.__version__,
        "device": device,
        "threads": args.threads,
        "clock": args.clock,
        "size": args.size,
        "batch": args.batch,
        "repeats": args.repeats,
        "captions_mean": float((~draw_batch("caption", args.batch)[2]).sum(1).float().mean()),  # type: ignore[operator]
        "results": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds of one thread")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    parser.add_argument("--part", choices=("time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("reference", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clock == "cpu":
        args.threads = 1
    torch.set_num_threads(args.threads)
    part = {None: compare, "time": measure_time, "memory": measure_memory}[args.part]
    print(json.dumps(part(args)))


if __name__ == "__main__":
    main()
