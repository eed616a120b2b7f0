"""The plain twin of the packed encoder: one sample, no plan, every token through the expert the paper gives it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.systems.beit3 import BEiT3


def encode_plainly(
    model: BEiT3, kind: str, image: Tensor | None, ids: Tensor | None, hide: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Final tokens (N, D) of one sample of a kind: image uint8 (3, H, W), ids int64 (T,), hide bool (P,)."""
    p = dict(model.named_parameters())
    parts: list[tuple[str, Tensor]] = []
    if image is not None:
        pixels = image[None].float() / 127.5 - 1
        patches = F.conv2d(pixels, p["vision.proj.weight"], p["vision.proj.bias"], stride=model.config.patch)
        rows = list(patches.flatten(2)[0].T)
        if hide is not None:
            rows = [p["vision.mask_token"].flatten() if hidden else row for row, hidden in zip(rows, hide.tolist())]
        rows = [p["vision.cls_token"].flatten(), *rows]
        parts.append(("image", torch.stack([row + p["vision.positions"][2 + i] for i, row in enumerate(rows)])))
    if ids is not None:
        rows = [p["language.words.weight"][i] + p["language.positions"][2 + n] for n, i in enumerate(ids.tolist())]
        parts.append(("text", torch.stack(rows)))
    modalities = [modality for modality, _ in parts]
    sizes = [len(x) for _, x in parts]
    x = torch.cat([x for _, x in parts])

    def expert(prefix: str, modality: str) -> str:
        names = (f"{prefix}.experts.{name}" for name in ((kind,) if kind == "pair" else ()) + (modality, "shared"))
        return next(name for name in names if any(key.startswith(name + ".") for key in p))

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def each(x: Tensor, prefix: str, fn) -> Tensor:
        """Every modality's rows through its own expert."""
        return torch.cat([fn(own, expert(prefix, m)) for m, own in zip(modalities, x.split(sizes))])

    def ffn(x: Tensor, name: str) -> Tensor:
        h = linear(norm(x, f"{name}.norm"), f"{name}.fc1")
        h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
        return linear(norm(h, f"{name}.inner"), f"{name}.fc2")

    images = sum(n for m, n in zip(modalities, sizes) if m == "image")
    place = torch.arange(len(x))
    sees = (place < images) | ((place[:, None] >= images) & (place <= place[:, None]))  # (query, key), when causal
    for layer in range(model.config.depth):
        block = f"encoder.blocks.{layer}"
        qkv = each(x, f"{block}.attention.qkv", lambda h, e: linear(norm(h, f"{e}.norm"), f"{e}.linear"))
        heads = []
        for q, k, v in zip(*(part.chunk(model.config.heads, dim=1) for part in qkv.chunk(3, dim=1))):
            scores = q @ k.T / q.shape[1] ** 0.5
            if causal:
                scores = torch.where(sees, scores, float("-inf"))
            heads.append(torch.softmax(scores, dim=1) @ v)
        mixed = torch.cat(heads, dim=1)
        x = x + each(mixed, f"{block}.attention.out", lambda h, e: linear(norm(h, f"{e}.norm"), f"{e}.linear"))
        x = x + each(x, f"{block}.ffn", ffn)
    return each(x, "encoder.norm", norm)
