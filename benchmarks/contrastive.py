"""Our contrastive training step beside open_clip's and transformers' CLIP, whichever are installed: the same towers,
weights and batch, one process, taken in turns; and the memory of a large batch with cached gradients.

    python benchmarks/contrastive.py --size small --clock cpu              # a busy machine: CPU seconds of one thread
    python benchmarks/contrastive.py --size base_patch32 --batch 32        # a quiet one: wall seconds, all threads
    python benchmarks/contrastive.py --size base_patch16 --batch 256 --large-size base_patch16 --device cuda

A step is forward, contrastive loss, backward; the optimiser is the same work on both sides. Captions have 9 to 20
tokens, 14 on average; ``padded``: the peer pads them to 77, as CLIP's tokenizers do and open_clip insists, ``longest``:
to the longest of the batch, as careful users of transformers can. The peer is given pixels that are normalised already.
Before anything is timed the losses must agree to 1e-4 in fp32. A figure is peer / ours, so 2 is twice as fast.

Memory is what a step of ``--large`` pairs needs above the model at rest, gradients included, as a share of the first
peer's: of ours as it is (``plain``) and in micro-batches (``cached``), each in a process of its own. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from memory import peak_of_cuda, peak_of_process
from reference import STUBS, draw_lengths
from timing import autocast, options, parsed, ratio, report, take_turns
from torch import Tensor, nn

from multiway.data.collate import DualCollate, Sample, Words
from multiway.systems.clip import CLIP, LAYOUTS, PRESETS, Config
from multiway.tasks.retrieval import ImageTextContrast
from multiway.types import Batch, move
from multiway.weights.rename import to_theirs

BASE, BOS, EOS = "clip_vit_base_patch32_224", 49406, 49407
SIZES = {
    "tiny": Config(
        out=32, dim=32, depth=2, heads=2, hidden=128, patch=8, image_px=32, text_dim=32, text_depth=2, text_heads=2,
        text_hidden=128,
    ),  # to try the script out
    "narrow": Config(
        out=128, dim=192, depth=4, heads=3, hidden=768, patch=8, image_px=64, text_dim=128, text_depth=4, text_heads=2,
        text_hidden=512,
    ),
    "small": Config(
        out=256, dim=384, depth=6, heads=6, hidden=1536, text_dim=256, text_depth=6, text_heads=4, text_hidden=1024
    ),
    "base_patch32": PRESETS[BASE],
    "base_patch16": PRESETS["clip_vit_base_patch16_224"],
}  # fmt: skip
SIDES = ("reference", "plain", "cached")
PEERS = {"open_clip": ("openai", "open_clip_torch"), "transformers": ("transformers", "transformers")}
"""Module -> our name of its layout, and its package; the first that is installed has its memory measured, too."""
PRESENT = [name for name in PEERS if importlib.util.find_spec(name)]


def build_ours(shape: Config, device: str) -> ImageTextContrast:
    """Ours with seeded weights."""
    with torch.device(device):
        model = CLIP(shape)
    torch.manual_seed(0)
    model.init_weights()
    return ImageTextContrast(model)


def build_peer(name: str, shape: Config, ours: ImageTextContrast, device: str) -> nn.Module:
    """A peer's model with our weights."""
    with torch.device(device):
        model = open_clips(shape) if name == "open_clip" else transformers(shape)
    model.load_state_dict(to_theirs(ours.model.state_dict(), LAYOUTS[PEERS[name][0]]))
    return model


def open_clips(shape: Config) -> nn.Module:
    """open_clip's model, without weights of ours yet."""
    if "transformers" in PRESENT:
        import transformers.models.clip.modeling_clip  # noqa: F401 - it looks for torchvision, a stub from here on
    sys.path.insert(0, str(STUBS))
    import open_clip

    vision = {"layers": shape.depth, "width": shape.dim, "head_width": shape.dim // shape.heads}
    vision |= {"patch_size": shape.patch, "image_size": shape.image_px, "mlp_ratio": shape.hidden / shape.dim}
    text = {"width": shape.text_dim, "heads": shape.text_heads, "layers": shape.text_depth}
    return open_clip.CLIP(shape.out, vision, text, quick_gelu=True)  # type: ignore[arg-type]


def transformers(shape: Config) -> nn.Module:
    """transformers' model, without weights of ours yet."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": shape.text_dim, "num_hidden_layers": shape.text_depth, "bos_token_id": BOS}
    text |= {"num_attention_heads": shape.text_heads, "intermediate_size": shape.text_hidden, "eos_token_id": EOS}
    vision = {"hidden_size": shape.dim, "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads}
    vision |= {"intermediate_size": shape.hidden, "image_size": shape.image_px, "patch_size": shape.patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.out))


def draw(shape: Config, batch: int, parts: int, device: str) -> tuple[list[Batch], Tensor]:
    """Pairs as our batches in so many parts, and their texts padded to 77; always the same ones."""
    generator = torch.Generator().manual_seed(1)
    assert isinstance(shape.image_px, int), "all sizes here are square"
    px, patches = shape.image_px, shape.image_px // shape.patch
    pixels = torch.randint(0, 256, (batch, 3, px, px), generator=generator, dtype=torch.uint8)
    padded = torch.zeros(batch, shape.text_tokens, dtype=torch.int64)
    samples = []
    for row, length, image in zip(padded, draw_lengths("caption", batch, generator).tolist(), pixels, strict=True):
        row[:length] = torch.randint(1, BOS, (length,), generator=generator)
        row[0], row[length - 1] = BOS, EOS
        samples.append(Sample(image=image, text=row[1 : length - 1].numpy()))
    words = Words(bos=BOS, eos=EOS, mask_id=-1, first=0, stop=BOS, longest=shape.text_tokens, window=shape.text_tokens)
    collate = DualCollate(words=words, grid=(patches, patches), causal=True)
    batches = [collate({"pair": samples[i * batch // parts : (i + 1) * batch // parts]}) for i in range(parts)]
    return move(batches, torch.device(device)), padded.to(device)


def peer_loss(name: str, model: Any, image: Tensor, ids: Tensor) -> Tensor:
    """A peer's loss of normalised pictures and padded texts."""
    if name == "transformers":
        return model(input_ids=ids, pixel_values=image, return_loss=True).loss
    import open_clip

    images, texts = model.encode_image(image, normalize=True), model.encode_text(ids, normalize=True)
    return open_clip.ClipLoss()(images, texts, model.logit_scale.exp())


def our_loss(objective: ImageTextContrast, batches: list[Batch]) -> Tensor:
    """Ours, of one batch or of several as one."""
    count = sum(len(batch["image"]) for batch in batches)
    return objective(batches[0] if len(batches) == 1 else batches, {"contrast": count}).loss


def step(model: nn.Module, loss: Callable[[], Tensor], dtype: str, device: str) -> None:
    """Forward, loss, backward."""
    model.zero_grad(set_to_none=True)
    with autocast(dtype, device):
        value = loss()
    value.backward()


def peaks(args: argparse.Namespace) -> list[float]:
    """MB each of several steps of one side needs above the model at rest."""
    shape, [dtype] = SIZES[args.large_size], args.dtypes
    ours = model = build_ours(shape, args.device)
    batches, padded = draw(shape, args.large, args.micros if args.side == "cached" else 1, args.device)
    loss = partial(our_loss, ours, batches)
    if args.side == "reference":
        model = build_peer(PRESENT[0], shape, ours, args.device)
        loss = partial(peer_loss, PRESENT[0], model, ours.model.pixels(batches[0]["image"]), padded)
    measure = peak_of_cuda if args.device == "cuda" else peak_of_process
    found = []
    for _ in range(args.repeats):
        model.zero_grad(set_to_none=True)
        found.append(measure(lambda: step(model, loss, dtype, args.device)))
    return found


def child(args: argparse.Namespace, dtype: str, side: str) -> list[float]:
    """`peaks` in a process whose heap gives every freed tensor back."""
    names = ("large", "large_size", "micros", "device", "threads")
    flags = {"dtypes": dtype, "side": side, "repeats": 2, **{name: getattr(args, name) for name in names}}
    command = [sys.executable, "-W", "ignore", __file__]
    command += [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> None:
    """Steps and memory, in every dtype."""
    if not PRESENT:
        raise SystemExit("this benchmark needs a peer: pip install transformers")
    shape, device = SIZES[args.size], args.device
    ours = build_ours(shape, device)
    peers = {name: build_peer(name, shape, ours, device) for name in PRESENT}
    [batch], padded = draw(shape, args.batch, 1, device)
    image, texts = ours.model.pixels(batch["image"]), {"padded": padded, "longest": padded[:, : longest_of(padded)]}
    cases = [(name, kind) for name in PRESENT for kind in texts if (name, kind) != ("open_clip", "longest")]
    passes = {f"{n} {kind}": (peers[n], partial(peer_loss, n, peers[n], image, texts[kind])) for n, kind in cases}
    passes["ours"] = ours, partial(our_loss, ours, [batch])
    with torch.no_grad():
        losses = {name: float(loss()) for name, (_, loss) in passes.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"the losses differ: {losses}")
    figures, facts = {}, {}
    for dtype in args.dtypes:
        sides = {name: partial(step, model, loss, dtype, device) for name, (model, loss) in passes.items()}
        took = take_turns(sides, args, peers=[name for name in sides if name != "ours"])
        figures |= {f"{name} {dtype}": ratio(own, took["ours"]) for name, own in took.items() if name != "ours"}
        if args.large:
            found = {side: child(args, dtype, side) for side in SIDES}
            for side in SIDES[1:]:
                figures[f"memory {side} {dtype}"] = ratio(found[side], found["reference"])
            facts[dtype] = {f"{side}_mb": round(statistics.median(values)) for side, values in found.items()}
    versions = [f"{name} {importlib.metadata.version(PEERS[name][1])}" for name in PRESENT]
    report(args, figures, peer=", ".join(versions), losses=losses, memory=facts)


def longest_of(padded: Tensor) -> int:
    """Tokens of the longest text."""
    return int((padded > 0).sum(1).max())


def main() -> None:
    """Read the options and compare."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--large", type=int, default=512, help="pairs of the step whose memory is measured, 0 = none")
    parser.add_argument("--large-size", choices=SIZES, default="narrow")
    parser.add_argument("--micros", type=int, default=16, help="micro-batches it is cut into")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parsed(parser)
    if args.side:
        print(json.dumps(peaks(args)))
    else:
        compare(args)


if __name__ == "__main__":
    main()
