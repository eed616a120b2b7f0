"""A whole step of masked pre-training: ours beside torchscale's BEiT-3 with the habits of common pre-training codes.

    python benchmarks/pretrain.py --size base --batch 8

Pairs of pictures and captions, 40 % of the patches and 50 % of the words hidden; encoder, both heads, targets and
backward, without the optimiser. Ours is `MaskedDataModeling`: texts packed, logits at hidden places alone, visual
tokens stored with the data. The reference pads texts to 64 and computes logits everywhere. ``online``: it also asks the
image tokenizer in every step, an encoder of the size of DALL-E's dVAE; ``cached``: it has the tokens stored, too. Both
sides have the same weights and must agree to 1e-4 in fp32 on the loss and on the gradients of the maps that read pixels
and words. A figure is reference / ours, so 2 is twice as fast. The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from reference import (
    PADDED_TO,
    SIZES,
    build_ours,
    build_reference,
    check_equal,
    comparable,
    draw_lengths,
    normalised,
    peer,
)
from timing import autocast, options, parsed, ratio, report, take_turns
from torch import Tensor, nn

from multiway.data.collate import MaskedCollate, Sample, Words
from multiway.run import Parallel
from multiway.systems.beit3 import BEiT3, Config, MaskedDataModeling
from multiway.types import Batch, move

Losses = Mapping[str, tuple[nn.Module, Callable[[], Tensor]]]
"""Side -> the module that is trained, and a function that returns its loss."""

FIRST_MAPS = ("vision_embed.proj.weight", "vision.proj.weight", "text_embed.weight", "words.weight")
"""What reads pixels and words, in the reference's names and in ours."""

LONGEST = PADDED_TO["caption"]
UNUSED = -100
"""Target of a place that is not predicted: what `cross_entropy` ignores."""


class Residual(nn.Module):
    """One block of the dVAE's encoder: four convolutions at a quarter of the width, scaled by 1/64."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        inner = [width, *[out // 4] * 3, out]
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inner[:3], inner[1:4], strict=True)]
        layers = [layer for conv in [*convolutions, nn.Conv2d(out // 4, out, 1)] for layer in (nn.ReLU(), conv)]
        self.path = nn.Sequential(*layers)
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C', H, W)."""
        return self.skip(x) + self.path(x) / 64


class DiscreteEncoder(nn.Module):
    """The encoder of DALL-E's dVAE in its published shape (53,786,240 parameters), with random weights.

    Four groups of two blocks, 256 to 2,048 wide, the picture halved between them; 8,192 visual tokens, stride 8.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 256, 7, padding=3)]
        before = 256
        for width in (256, 512, 1024, 2048):
            layers += [Residual(before, width), Residual(width, width), nn.MaxPool2d(2)]
            before = width
        layers[-1] = nn.ReLU()  # the last group is not halved
        self.layers = nn.Sequential(*layers, nn.Conv2d(2048, 8192, 1))
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.normal_(conv.weight, std=1 / math.sqrt(conv.in_channels * conv.kernel_size[0] ** 2))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """image: float (B, 3, 8 h, 8 w) in [0, 1] -> visual tokens int64 (B, h w)."""
        return self.layers(image * 0.8 + 0.1).argmax(1).flatten(1)


def draw_batch(shape: Config, count: int, tokenizer: DiscreteEncoder, device: str) -> tuple[Batch, Tensor]:
    """A batch of ours with stored visual tokens, and the small pictures (B, 3, 112, 112) the tokenizer reads."""
    generator = torch.Generator().manual_seed(1)
    grid, px = shape.grid, shape.image_px
    images = torch.randint(0, 256, (count, 3, px, px), generator=generator, dtype=torch.uint8).to(device)
    small = F.interpolate(images.float() / 255, size=(8 * grid[0], 8 * grid[1]), mode="area")
    codes = tokenizer(small).cpu()
    words = Words(bos=0, eos=2, mask_id=shape.vocab - 1, first=4, stop=shape.vocab - 1, longest=LONGEST, window=LONGEST)
    rng = np.random.default_rng(1)
    texts = [rng.integers(words.first, words.stop, n - 2) for n in draw_lengths("caption", count, generator).tolist()]
    samples = [
        Sample(image=image, text=text, code=code, record=i, rng=np.random.default_rng(i))
        for i, (image, text, code) in enumerate(zip(images.cpu(), texts, codes, strict=True))
    ]
    return MaskedCollate(words=words, grid=grid)({"pair": samples}), small


class UsualPretraining(nn.Module):
    """The reference's encoder with heads at all positions, and a loss that ignores those that are not hidden."""

    def __init__(self, encoder: nn.Module, heads: BEiT3, tokenizer: DiscreteEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlm_head = nn.Linear(heads.config.dim, heads.config.vocab)
        self.mim_head = nn.Linear(heads.config.dim, heads.config.codes)
        self.mlm_head.load_state_dict(heads.mlm_head.state_dict())
        self.mim_head.load_state_dict(heads.mim_head.state_dict())
        self.tokenizer = tokenizer.requires_grad_(False)

    def forward(self, inputs: dict[str, Tensor], small: Tensor | None) -> Tensor:
        """``inputs``: as `padded` makes them; ``small``: pictures for the tokenizer, None = take the stored tokens."""
        codes = inputs["codes"] if small is None else self.tokenizer(small)
        out = self.encoder(
            textual_tokens=inputs["ids"],
            visual_tokens=inputs["pixels"],
            text_padding_position=inputs["pad"],
            vision_masked_position=inputs["hide"],
        )["encoder_out"]  # (B, 1 + P + 64, D)
        images = 1 + codes.shape[1]
        target = codes.masked_fill(~inputs["hide"], UNUSED)
        image = F.cross_entropy(self.mim_head(out[:, 1:images]).flatten(0, 1).float(), target.flatten())
        text = F.cross_entropy(self.mlm_head(out[:, images:]).flatten(0, 1).float(), inputs["target"].flatten())
        return image + text


def padded(batch: Batch) -> dict[str, Tensor]:
    """A batch of ours as the reference reads it: texts padded to 64, a target for every place."""
    plan = batch["plan"]
    starts = plan.starts["text"]
    lengths = torch.diff(starts, append=starts.new_tensor([plan.extent("text")[1]]))
    pad = torch.arange(LONGEST) >= lengths[:, None]
    ids = torch.ones(pad.shape, dtype=torch.int64)
    ids[~pad] = batch["text"]
    targets = torch.full_like(batch["text"], UNUSED).index_copy(0, batch["text_hidden"], batch["text_target"])
    target = torch.full_like(ids, UNUSED)
    target[~pad] = targets
    pixels = normalised(batch["image"])
    hide, codes = batch["image_hide"], batch["image_code"]
    return {"pixels": pixels, "hide": hide, "ids": ids, "pad": pad, "codes": codes, "target": target}  # type: ignore


def step(model: nn.Module, loss: Callable[[], Tensor], dtype: str, device: str) -> None:
    """Forward and backward; gradients are left in place."""
    model.zero_grad(set_to_none=True)
    with autocast(dtype, device):
        value = loss()
    value.backward()


def differences(losses: Losses, device: str) -> dict[str, float]:
    """How far losses and gradients of the first maps are apart, by side; ends the run where it is too far."""
    found = {}
    for side, (model, loss) in losses.items():
        step(model, loss, "fp32", device)
        pixels, words = sorted(
            (w for name, w in model.named_parameters() if name.endswith(FIRST_MAPS)), key=torch.numel
        )
        gradients = [w.grad.flatten() for w in (pixels, words) if w.grad is not None]
        with torch.no_grad():
            found[side] = loss(), torch.cat(gradients).clone()
    value, gradient = found.pop("ours")
    apart = {}
    for side, (own_value, own_gradient) in found.items():
        scale = own_gradient.abs().max()
        apart[f"{side} loss"] = check_equal(f"loss, {side}", own_value, value)
        apart[f"{side} gradient"] = check_equal(f"gradient, {side}", own_gradient / scale, gradient / scale)
    return apart


def main() -> None:
    """Compare with both kinds of reference in every dtype."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="torch.compile each of our blocks")
    args = parsed(parser)
    shape = comparable(args.size)
    encoder = build_reference(shape, args.device)
    model = build_ours(dataclasses.replace(shape, masked=True), encoder, args.device, Parallel(compile=args.compile))
    with torch.device(args.device):
        tokenizer = DiscreteEncoder()
        reference = UsualPretraining(encoder, model, tokenizer)
    ours = MaskedDataModeling(model, None)
    batch, small = draw_batch(shape, args.batch, tokenizer, args.device)
    counts = {term: float(n) for term, n in ours.counts(batch).items()}
    device = torch.device(args.device)
    batch, inputs = move(batch, device), {name: x.to(device) for name, x in padded(batch).items()}
    losses = {
        "online": (reference, lambda: reference(inputs, small)),
        "cached": (reference, lambda: reference(inputs, None)),
        "ours": (ours, lambda: ours(batch, counts).loss),
    }
    apart = differences(losses, args.device)
    figures, facts = {}, {}
    for dtype in args.dtypes:
        sides = {name: partial(step, own, loss, dtype, args.device) for name, (own, loss) in losses.items()}
        took = take_turns(sides, args, peers=["online", "cached"])
        facts[dtype] = {side: statistics.median(own) for side, own in took.items()}
        for side in ("online", "cached"):
            figures[f"{side} {dtype}"] = ratio(took[side], took["ours"])
    report(args, figures, peer=peer(), apart=apart, items=counts, seconds=facts)


if __name__ == "__main__":
    main()
