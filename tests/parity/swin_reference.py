"""Runs timm's Swin and Swin V2 in a process of their own, with the stubs beside this file on its path.

``swin_reference.py FILE`` writes weights, pictures, scores and gradients of small random models as safetensors, and
their settings, for which it never imports multiway, as JSON metadata.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

SHAPE = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "num_classes": 7}
MODELS = {
    # maps of 16, 8 and 4 places: windows shifted, as large as the map, and cut to it
    "swin": (SwinTransformer, {"img_size": 64, "window_size": 4}),
    "swin_wide": (SwinTransformer, {"img_size": (128, 192), "window_size": 4}),
    "swin_v2": (SwinTransformerV2, {"img_size": 64, "window_size": 4}),
    "swin_v2_moved": (SwinTransformerV2, {"img_size": 128, "window_size": 8, "pretrained_window_sizes": (4, 4, 2)}),
}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Seeded normals everywhere, norms around 1, large enough that every part matters to the outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm_weight else 0.15 * noise)


def run(name: str) -> dict[str, Tensor]:
    build, settings = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    model = build(**SHAPE, **settings).eval()
    randomize(model, generator)
    size = settings["img_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    image = torch.randn(2, 3, height, width, generator=generator).requires_grad_()
    scores = model(image)
    weight = torch.randn(scores.shape, generator=generator)
    (scores * weight).sum().backward()
    tensors = {"image": image.detach(), "scores": scores.detach(), "weight": weight, "grad_image": image.grad}
    tensors |= {f"state.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"grad.{key}": value.grad for key, value in model.named_parameters()}
    return {f"{name}/{key}": value.contiguous() for key, value in tensors.items()}


if __name__ == "__main__":
    found: dict[str, Tensor] = {}
    for model_name in MODELS:
        found |= run(model_name)
    described = {name: json.dumps(SHAPE | settings) for name, (_, settings) in MODELS.items()}
    save_file(found, sys.argv[1], metadata=described)
