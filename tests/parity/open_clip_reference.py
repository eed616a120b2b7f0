"""Runs a small random CLIP of open_clip in a process of its own, with the stubs beside this file on its path.

``open_clip_reference.py SETTINGS FILE`` writes weights, pictures, packed texts, unit vectors, the loss and its
gradients as safetensors; SETTINGS is a JSON object for ``open_clip.CLIP``. It never imports multiway.
"""

from __future__ import annotations

import json
import sys

import open_clip
import torch
from safetensors.torch import save_file

LENGTHS, BOS, EOS = [5, 12, 3, 9], 38, 39


def run(settings: str, path: str) -> None:
    given = json.loads(settings)
    generator = torch.Generator().manual_seed(0)
    model = open_clip.CLIP(**given).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if around_one else 0.15 * noise)
    px = given["vision_cfg"]["image_size"]
    image = torch.randn(len(LENGTHS), 3, px, px, generator=generator)
    text = torch.zeros(len(LENGTHS), given["text_cfg"]["context_length"], dtype=torch.int64)
    for row, length in zip(text, LENGTHS):
        row[:length] = torch.randint(1, BOS, (length,), generator=generator)
        row[0], row[length - 1] = BOS, EOS
    images, texts = model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)
    loss = open_clip.ClipLoss()(images, texts, model.logit_scale.exp())
    loss.backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    tensors = {"image": image, "image_vectors": images.detach(), "text_vectors": texts.detach(), "loss": loss.detach()}
    tensors["text"] = torch.cat([row[:length] for row, length in zip(text, LENGTHS)])
    tensors |= {f"state.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"grad.{key}": grads.get(key, torch.zeros_like(value)) for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


if __name__ == "__main__":
    run(*sys.argv[1:])
