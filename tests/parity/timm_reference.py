"""Runs a small random classifier of timm in a process of its own, with the stubs beside this file on its path.

``timm_reference.py NAME SETTINGS FILE`` writes weights, pictures, scores and gradients as safetensors; SETTINGS is a
JSON object for ``timm.create_model``. It never imports multiway.
"""

from __future__ import annotations

import json
import sys

import timm
import torch
from safetensors.torch import save_file


def run(name: str, settings: str, path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model(name, **json.loads(settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if around_one else 0.15 * noise)
    size = model.patch_embed.img_size
    image = torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    scores = model((image.float() / 255 - mean) / std)
    weight = torch.randn(scores.shape, generator=generator)  # the loss is a random projection of the scores
    (scores * weight).sum().backward()
    tensors = {"image": image, "scores": scores.detach(), "weight": weight}
    tensors |= {f"state.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"grad.{key}": value.grad for key, value in model.named_parameters()}
    save_file(tensors, path)


if __name__ == "__main__":
    run(*sys.argv[1:])
