"""Training steps of our vision systems beside transformers' models of the same size, weights and batch.

    python benchmarks/vision.py --clock cpu                # a busy machine: CPU seconds of one thread
    python benchmarks/vision.py --rows vit_small mae_base  # a quiet one: wall seconds, all threads
    python benchmarks/vision.py --device cuda
    python benchmarks/vision.py --quick                    # every model cut to a few blocks: does it run?

A step is forward, loss, backward, without the optimiser. Both sides read the same normalised pictures; of MAE and BEiT
the same patches are hidden. Before anything is timed the losses and the gradients of the map that reads pixels must
agree in fp32. ``time`` is reference / ours, so 2 is twice as fast; ``memory`` is ours / reference, the most a step
needs above the model at rest, in a process of its own per side. Every row ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_of_cuda, peak_of_process
from safetensors.torch import load_file
from timing import autocast, options, parsed, ratio, report, take_turns
from torch import Tensor, nn

from multiway.data.collate import Sample
from multiway.data.hide import hide_blocks, hide_patches
from multiway.data.pictures import LabelCollate, PictureCollate
from multiway.engine.parallel import Process, spread
from multiway.run import Parallel
from multiway.tasks.image_classification import ImageClassification
from multiway.types import Batch, Objective, move
from multiway.weights.rename import to_ours

TOLERANCE = {"loss": 1e-5, "gradient": 1e-3}
"""Relative differences in fp32 up to which both sides are the same step."""

SIDES = ("reference", "ours")
BEIT_RATIO = 0.4


@dataclass(frozen=True)
class Row:
    """A preset of a system, as what it is trained (``classes``, ``pixels`` or ``codes``), and samples of a step on a
    CPU and on a GPU.

    ``original``: transformers' class; ``settings``: our config in its words; ``cut``: what ``--quick`` changes.
    """

    system: str
    preset: str
    task: str
    original: str
    settings: Callable[[Any], dict[str, Any]]
    batch: int
    cuda: int
    cut: Mapping[str, Any]


def of_vit(shape: Any) -> dict[str, Any]:
    """A plain ViT's."""
    return {
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "patch_size": shape.patch,
        "layer_norm_eps": 1e-6,
    }


def of_mae(shape: Any) -> dict[str, Any]:
    """A ViT's and a decoder's."""
    return of_vit(shape) | {
        "decoder_hidden_size": shape.decoder_dim,
        "decoder_num_hidden_layers": shape.decoder_depth,
        "decoder_num_attention_heads": shape.decoder_heads,
        "decoder_intermediate_size": 4 * shape.decoder_dim,
        "norm_pix_loss": shape.normed,
    }


def of_swin(shape: Any) -> dict[str, Any]:
    """A Swin's, of either version."""
    return {
        "embed_dim": shape.dim,
        "depths": list(shape.depths),
        "num_heads": [shape.heads * 2**stage for stage in range(len(shape.depths))],
        "patch_size": shape.patch,
        "window_size": shape.window,
        "drop_path_rate": 0.0,
    }


def of_beit(shape: Any) -> dict[str, Any]:
    """A BEiT's to be pre-trained."""
    return of_vit(shape) | {
        "vocab_size": shape.codes,
        "use_mask_token": True,
        "use_shared_relative_position_bias": True,
        "layer_scale_init_value": shape.layer_scale,
        "drop_path_rate": 0.0,
    }


TWO = {"depth": 2}
STAGES = {"depths": (2, 2, 2, 2)}
VIT, SWIN, SWIN_V2 = (f"{name}ForImageClassification" for name in ("ViT", "Swin", "Swinv2"))
BEIT, MAE = "BeitForMaskedImageModeling", "ViTMAEForPreTraining"
ROWS = {
    "vit_small": Row("vit", "vit_small_patch16_224", "classes", VIT, of_vit, 8, 256, TWO),
    "vit_base": Row("vit", "vit_base_patch16_224", "classes", VIT, of_vit, 4, 128, TWO),
    "mae_base": Row("mae", "mae_vit_base_patch16_224", "pixels", MAE, of_mae, 8, 256, TWO),
    "beit_base": Row("beit", "beit_base_patch16_224_pt22k", "codes", BEIT, of_beit, 4, 128, TWO),
    "swin_tiny": Row("swin", "swin_tiny_patch4_window7_224", "classes", SWIN, of_swin, 8, 128, STAGES),
    "swin_v2_tiny": Row("swin_v2", "swinv2_tiny_window8_256", "classes", SWIN_V2, of_swin, 4, 128, STAGES),
}


@dataclass(frozen=True)
class Side:
    """What is trained, a function that returns its loss, and the map that reads pixels."""

    model: nn.Module
    loss: Callable[[], Tensor]
    first: nn.Parameter

    def step(self, dtype: str, device: str) -> None:
        """Forward and backward; gradients are left in place."""
        self.model.zero_grad(set_to_none=True)
        with autocast(dtype, device):
            loss = self.loss()
        loss.backward()


def both(row: Row, args: argparse.Namespace) -> dict[str, Side]:
    """The original and ours, with the same weights and the same batch."""
    system = importlib.import_module(f"multiway.systems.{row.system}")
    shape = dataclasses.replace(system.PRESETS[row.preset], **(row.cut if args.quick else {}))
    original = build_original(row, shape)
    with torch.device("meta"):
        objective = build_objective(row, system, shape)
    model: Any = objective.model
    state = to_ours(published(original), system.LAYOUTS["transformers"], model.state_dict())
    model.load_state_dict(state, assign=True)
    device = torch.device(args.device)
    original.to(device)
    spread(objective, Process(0, 1, device, None), Parallel(compile=args.compile))
    count = args.batch or (2 if args.quick else row.cuda if args.device == "cuda" else row.batch)
    batch = move(draw(row, shape, count), device)
    batch["image"] = model.pixels(batch["image"])
    counts = objective.counts(batch)
    inputs = as_original(row, batch)
    first = next(p for name, p in original.named_parameters() if name.endswith("patch_embeddings.projection.weight"))
    return {
        "reference": Side(original, lambda: original(**inputs).loss, first),
        "ours": Side(objective, lambda: objective(batch, counts).loss, model.encoder.embed.weight),
    }


def build_original(row: Row, shape: Any) -> nn.Module:
    """transformers' model with seeded weights, all of them random."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    family = getattr(transformers, row.original)
    settings = row.settings(shape) | {"image_size": shape.image_px}
    if shape.classes:
        settings["num_labels"] = shape.classes
    torch.manual_seed(0)
    model = family(family.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model.train()


def build_objective(row: Row, system: Any, shape: Any) -> Objective:
    """Ours, not initialised."""
    if row.task == "pixels":
        return system.MaskedAutoencoding(system.MAE(shape))
    if row.task == "codes":
        return system.MaskedImageModeling(system.BEiT(shape), None)
    [model] = [own for own in vars(system).values() if hasattr(own, "accepts") and own.__module__ == system.__name__]
    return ImageClassification(model(shape))


def published(model: Any) -> dict[str, Tensor]:
    """Its weights under the names that files on the hub have."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
    return {name.replace("decoder_encoder.layer.", "decoder_layers."): tensor for name, tensor in state.items()}


def draw(row: Row, shape: Any, count: int) -> Batch:
    """A batch of ours, always the same one."""
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, shape.image_px, shape.image_px), dtype=np.uint8))
    side = shape.image_px // shape.patch
    samples = [
        Sample(
            image=image, label=int(rng.integers(shape.classes or 1)), record=i, rng=np.random.default_rng(i),
            code=torch.from_numpy(rng.integers(shape.codes, size=side**2)) if row.task == "codes" else None,
        )
        for i, image in enumerate(images)
    ]  # fmt: skip
    collate: Any = LabelCollate()
    if row.task == "pixels":
        collate = PictureCollate(hide=partial(hide_patches, (side, side), 0.75), keep=True)
    if row.task == "codes":
        collate = PictureCollate(hide=partial(hide_blocks, (side, side), round(BEIT_RATIO * side**2), 16))
    return collate({"image": samples})


def as_original(row: Row, batch: Batch) -> dict[str, Tensor]:
    """The batch as transformers' model takes it; MAE hides the patches with the most noise."""
    image = {"pixel_values": batch["image"]}
    if row.task == "classes":
        return image | {"labels": batch["label"]}
    hide = batch["image_hide"]
    if row.task == "pixels":
        return image | {"noise": hide + torch.linspace(0, 0.5, hide.shape[1], device=hide.device)}
    return image | {"bool_masked_pos": hide, "labels": batch["image_code"][hide]}


def check_equal(sides: Mapping[str, Side]) -> dict[str, float]:
    """Relative differences of loss and gradient; ends the run where they are too large."""
    losses, gradients = [], []
    for side in sides.values():
        side.model.zero_grad(set_to_none=True)
        loss = side.loss()
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, side.first)[0])
    pairs = {"loss": losses, "gradient": gradients}
    apart = {name: float((own - theirs).norm() / theirs.norm()) for name, (theirs, own) in pairs.items()}
    if not all(apart[name] <= most for name, most in TOLERANCE.items()):
        raise SystemExit(f"ours and the reference differ by {apart}, the comparison would be void")
    return apart


def peaks(side: Side, dtype: str, args: argparse.Namespace) -> list[float]:
    """MB each of several steps of one side needs above the model at rest."""
    measure = peak_of_cuda if args.device == "cuda" else peak_of_process
    side.step(dtype, args.device)  # kernels and thread pools exist from here on
    found = []
    for _ in range(3):
        side.model.zero_grad(set_to_none=True)
        found.append(measure(lambda: side.step(dtype, args.device)))
    return found


def peaks_apart(row: str, dtype: str, name: str, args: argparse.Namespace) -> list[float]:
    """`peaks` in a process whose heap gives every freed tensor back."""
    command = [sys.executable, "-W", "ignore", __file__, "--rows", row, "--dtypes", dtype, "--side", name]
    command += ["--device", args.device, "--threads", str(args.threads)]
    command += [*(["--quick"] if args.quick else []), *(["--batch", str(args.batch)] if args.batch else [])]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, args: argparse.Namespace) -> None:
    """Measure a row in every dtype, and report it."""
    sides = both(ROWS[name], args)
    apart = check_equal(sides)
    figures, seconds, megabytes = {}, {}, {}
    for dtype in args.dtypes:
        took = take_turns({side: partial(sides[side].step, dtype, args.device) for side in SIDES}, args, ["reference"])
        figures[f"{name} {dtype} time"] = ratio(took["reference"], took["ours"])
        seconds[dtype] = {side: statistics.median(own) for side, own in took.items()}
    del sides
    if args.device == "cuda":
        torch.cuda.empty_cache()  # the processes below need the room
    for dtype in args.dtypes:
        found = {side: peaks_apart(name, dtype, side, args) for side in SIDES}
        figures[f"{name} {dtype} memory"] = ratio(found["ours"], found["reference"])
        megabytes[dtype] = {side: round(statistics.median(own)) for side, own in found.items()}
    peer = f"transformers {importlib.metadata.version('transformers')}"
    report(args, figures, row=name, peer=peer, apart=apart, seconds=seconds, megabytes=megabytes)


def main() -> None:
    """Every row asked for."""
    parser = options(__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch", type=int, help="pictures a step, None = by row and device")
    parser.add_argument("--quick", action="store_true", help="cut every model to a few blocks")
    parser.add_argument("--compile", action="store_true", help="torch.compile each of our blocks")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parsed(parser)
    if args.side:
        [name], [dtype] = args.rows, args.dtypes
        side = both(ROWS[name], args)[args.side]
        print(json.dumps(peaks(side, dtype, args)))
        return
    for name in args.rows:
        compare(name, args)


if __name__ == "__main__":
    main()
