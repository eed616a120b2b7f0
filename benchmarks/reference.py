"""torchscale's BEiT-3 and ours with the same weights, and the batches both are given."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import autocast
from torch import Tensor, nn

from multiway.engine.parallel import Process, spread
from multiway.plan import make_plan
from multiway.run import Parallel
from multiway.systems.beit3 import LAYOUTS, PRESETS, BEiT3, Config, MaskedDataModeling
from multiway.weights.rename import to_ours

STUBS = Path(__file__).parents[1] / "tests" / "parity" / "stubs"
"""Stand in for what torchscale imports and does not use here: torchvision, fairscale."""

SIZES = {
    "tiny": Config(dim=32, depth=2, heads=2, hidden=64),  # to try the scripts out
    "narrow": Config(dim=384, depth=4, heads=6, hidden=1536),
    "small": PRESETS["beit3_small_patch16_224"],
    "base": PRESETS["beit3_base_patch16_224"],
    "large": PRESETS["beit3_large_patch16_224"],
    "giant": PRESETS["beit3_giant_patch14_224"],
}
TEXTS = {"pair": "full", "caption": "caption", "text": "caption", "uniform": "uniform"}
"""Setting -> lengths of its texts. pair, caption: pictures with texts; text, uniform: texts alone; image: pictures."""

SETTINGS = ("image", *TEXTS)
PADDED_TO = {"full": 64, "caption": 64, "uniform": 128}
"""Tokens to which the reference pads; 64 is what its released data set class does."""

TOLERANCE = 1e-4
PLAIN = Parallel()


@dataclass(frozen=True)
class Work:
    """A batch before either side lays it out: pixels uint8 (B, 3, H, W), ids int64 (B, N), pad bool (B, N), True =
    padding; None where there are no pictures or no texts."""

    pixels: Tensor | None
    ids: Tensor | None = None
    pad: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real text tokens."""
        return 0 if self.pad is None else int((~self.pad).sum())


def comparable(size: str, image_px: int | None = None, **changes: object) -> Config:
    """The shape of a size as torchscale can build it too: everything per modality, no heads."""
    shape = dataclasses.replace(SIZES[size], attention="decoupled", joint_layers=0, masked=False)
    return dataclasses.replace(shape, **{"image_px": image_px or shape.image_px, **changes})


def build_reference(shape: Config, device: str) -> nn.Module:
    """torchscale's BEiT-3 with seeded weights, all of them random."""
    sys.path.insert(0, str(STUBS))
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3 as Theirs

    config = EncoderConfig(
        multiway=True,
        no_output_layer=True,
        encoder_embed_dim=shape.dim,
        encoder_layers=shape.depth,
        encoder_attention_heads=shape.heads,
        encoder_ffn_embed_dim=shape.hidden,
        img_size=shape.image_px,
        patch_size=shape.patch,
        vocab_size=shape.vocab,
    )
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = Theirs(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def peer() -> str:
    """Name and version of the reference."""
    return f"torchscale {importlib.metadata.version('torchscale')}"


def build_ours(shape: Config, reference: nn.Module, device: str, parallel: Parallel = PLAIN) -> BEiT3:
    """Our model with the reference's weights, placed by our engine (which compiles or recomputes if told to)."""
    with torch.device(device):
        model = BEiT3(shape)
    theirs = {f"beit3.{name}": value for name, value in reference.state_dict().items()}
    heads = {name: value for name, value in model.state_dict().items() if name.startswith(("mlm_head", "mim_head"))}
    model.load_state_dict(to_ours(theirs | heads, LAYOUTS["official"], model.state_dict()))
    place(model, device, parallel)
    return model


def place(model: BEiT3, device: str, parallel: Parallel) -> None:
    """Have our engine place a model on one device."""
    spread(MaskedDataModeling(model, None), Process(0, 1, torch.device(device), None), parallel)


def draw_lengths(lengths: str, batch: int, generator: torch.Generator) -> Tensor:
    """Tokens of each text with ``<s>`` and ``</s>``: int64 (B,).

    full: 64; caption: 9 to 20, 14 on average, as COCO's; uniform: 8 to 128 evenly.
    """
    if lengths == "caption":
        return torch.randint(9, 21, (3, batch), generator=generator).float().mean(0).round().long()
    if lengths == "uniform":
        return torch.linspace(8, 128, batch).round().long()[torch.randperm(batch, generator=generator)]
    return torch.full((batch,), PADDED_TO["full"])


def draw(setting: str, shape: Config, batch: int, device: str) -> Work:
    """The batch of a setting, always the same one."""
    generator = torch.Generator().manual_seed(1)
    pixels = None
    if setting not in ("text", "uniform"):
        size = (batch, 3, shape.image_px, shape.image_px)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)
    if setting == "image":
        return Work(pixels)
    places = torch.arange(PADDED_TO[TEXTS[setting]])
    pad = places >= draw_lengths(TEXTS[setting], batch, generator)[:, None]
    ids = torch.randint(4, shape.vocab, pad.shape, generator=generator)
    return Work(pixels, ids.to(device), pad.to(device))


def normalised(pixels: Tensor | None) -> Tensor | None:
    """Pictures as the reference reads them."""
    return None if pixels is None else pixels.float() / 127.5 - 1


def reference_pass(model: nn.Module, work: Work) -> Callable[[], Tensor]:
    """A function that returns the reference's final hidden states (B, N, D), padding included."""
    pixels, pad = normalised(work.pixels), None if work.pad is None or not work.pad.any() else work.pad
    return lambda: model(textual_tokens=work.ids, visual_tokens=pixels, text_padding_position=pad)["encoder_out"]


def our_pass(model: BEiT3, work: Work) -> Callable[[], Tensor]:
    """A function that returns our final hidden states (R, D), one row per real token."""
    lengths, text = {}, None
    if work.pixels is not None:
        lengths["image"] = [1 + model.config.grid[0] * model.config.grid[1]] * len(work.pixels)
    if work.ids is not None and work.pad is not None:
        lengths["text"] = (~work.pad).sum(1).tolist()
        text = work.ids[~work.pad]
    kind = "pair" if len(lengths) == 2 else next(iter(lengths))
    plan = make_plan({kind: lengths}).to(model.vision.cls_token.device)
    return lambda: model(plan, image=work.pixels, text=text).values


def real_rows(out: Tensor, work: Work) -> Tensor:
    """The reference's hidden states (B, N, D) at real tokens, in our order: (R, D)."""
    if work.pad is None:
        return out.flatten(0, 1)
    images = out.shape[1] - work.pad.shape[1]
    return torch.cat([out[:, :images].flatten(0, 1), out[:, images:][~work.pad]])


def check_equal(what: str, reference: Tensor, ours: Tensor) -> float:
    """Largest difference, relative to the reference's largest magnitude if that is above 1; ends the run if it is too
    large."""
    apart = float((reference - ours).abs().max() / reference.abs().max().clamp(min=1))
    if not apart <= TOLERANCE:
        raise SystemExit(f"{what}: ours and the reference differ by {apart:.2e}, the comparison would be void")
    return apart


def step(model: nn.Module, run: Callable[[], Tensor], dtype: str, device: str) -> None:
    """One training step on the mean square of what ``run`` returns; gradients are left in place."""
    model.zero_grad(set_to_none=True)
    with autocast(dtype, device):
        out = run()
    out.float().square().mean().backward()
