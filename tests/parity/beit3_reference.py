"""Runs torchscale's BEiT-3 in a process of its own, with the stubs beside this file on its path.

``beit3_reference.py pass FILE`` writes weights, inputs, outputs and gradients of a small random model as safetensors;
``beit3_reference.py keys FILE`` writes the shapes of base and large as JSON. It never imports multiway.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchscale.architecture.config import EncoderConfig
from torchscale.model.BEiT3 import BEiT3

IMAGE_PX, PATCH, VOCAB = 32, 8, 61
IMAGE_LENGTH = 17
TEXT_LENGTHS = {"pair": [9, 1, 4], "text": [1, 13, 6, 13]}


def build(dim: int, depth: int, heads: int, image_px: int, patch: int, vocab: int, positions: int = 1024) -> BEiT3:
    """A model with the hyper-parameters its authors give BEiT-3; the FFN is four times as wide."""
    config = EncoderConfig(
        multiway=True,
        no_output_layer=True,
        encoder_embed_dim=dim,
        encoder_layers=depth,
        encoder_attention_heads=heads,
        encoder_ffn_embed_dim=4 * dim,
        img_size=image_px,
        patch_size=patch,
        vocab_size=vocab,
        max_source_positions=positions,
    )
    return BEiT3(config).eval()


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Seeded normals everywhere, norms around 1, large enough that every part matters to the outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm_weight else 0.15 * noise)


def draw_inputs(generator: torch.Generator) -> dict[str, Tensor]:
    inputs = {}
    for kind, count in (("image", 2), ("pair", 3)):
        shape = (count, 3, IMAGE_PX, IMAGE_PX)
        inputs[f"{kind}.pixels"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        inputs[f"{kind}.hide"] = torch.rand(count, IMAGE_LENGTH - 1, generator=generator) < 0.4
    for kind, lengths in TEXT_LENGTHS.items():
        shape = (len(lengths), max(lengths))
        inputs[f"{kind}.ids"] = torch.randint(4, VOCAB, shape, generator=generator)
        inputs[f"{kind}.pad"] = torch.arange(shape[1]) >= torch.tensor(lengths)[:, None]
    return inputs


def encode(model: BEiT3, inputs: dict[str, Tensor], kind: str) -> Tensor:
    """Final tokens (B, N, D) of one kind of samples, image tokens first."""
    pixels, pad = inputs.get(f"{kind}.pixels"), inputs.get(f"{kind}.pad")
    return model(
        textual_tokens=inputs.get(f"{kind}.ids"),
        visual_tokens=None if pixels is None else pixels.float() / 127.5 - 1,
        text_padding_position=pad,
        vision_masked_position=inputs.get(f"{kind}.hide"),
    )["encoder_out"]


def run(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = build(48, 3, 4, IMAGE_PX, PATCH, VOCAB, positions=40)
    randomize(model, generator)
    inputs = draw_inputs(generator)
    loss = torch.zeros(())
    outputs = {}
    for kind in ("image", "pair", "text"):
        out = encode(model, inputs, kind)
        weight = torch.randn(out.shape, generator=generator)  # the loss is a random projection of the real tokens
        if kind != "image":
            text = out.shape[1] - inputs[f"{kind}.pad"].shape[1]
            weight[:, text:][inputs[f"{kind}.pad"]] = 0
        loss = loss + (out * weight).sum()
        outputs |= {f"output.{kind}": out.detach().contiguous(), f"weight.{kind}": weight}
    loss.backward()
    tensors = {f"input.{name}": value for name, value in inputs.items()} | outputs
    tensors |= {f"state.beit3.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"grad.beit3.{name}": value.grad for name, value in model.named_parameters()}
    save_file(tensors, path)


def keys(path: Path) -> None:
    with torch.device("meta"):
        models = {"base": build(768, 12, 12, 224, 16, 64010), "large": build(1024, 24, 16, 224, 16, 64010)}
    shapes = {
        size: {f"beit3.{name}": list(value.shape) for name, value in model.state_dict().items()}
        for size, model in models.items()
    }
    path.write_text(json.dumps(shapes))


if __name__ == "__main__":
    {"pass": run, "keys": keys}[sys.argv[1]](Path(sys.argv[2]))
