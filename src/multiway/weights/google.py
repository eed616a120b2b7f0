"""The arrays of Google's ViT files (``.npz``, of JAX) as tensors under timm's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from multiway.errors import ConversionError

PREFIXES = ("opt/target/", "params/")
BLOCK = "Transformer/encoderblock_"
STACKED = "Transformer/encoderblock/"
"""Where big_vision's "scan" files hold all blocks at once, along the first axis."""
NEWER = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
"""big_vision's numbers of a block's parts -> the first ones."""

STEM = {
    "cls_token": ("cls",),
    "pos_embed": ("Transformer/posembed_input/pos_embedding",),
    "patch_embed.proj.weight": ("embedding/kernel",),
    "patch_embed.proj.bias": ("embedding/bias",),
    "norm.weight": ("Transformer/encoder_norm/scale",),
    "norm.bias": ("Transformer/encoder_norm/bias",),
    "head.weight": ("head/kernel",),
    "head.bias": ("head/bias",),
}
_ATTENTION, _FFN = "MultiHeadDotProductAttention_1/", "MlpBlock_3/"
PARTS = {
    "norm1.weight": ("LayerNorm_0/scale",),
    "norm1.bias": ("LayerNorm_0/bias",),
    "attn.qkv.weight": tuple(f"{_ATTENTION}{name}/kernel" for name in ("query", "key", "value")),
    "attn.qkv.bias": tuple(f"{_ATTENTION}{name}/bias" for name in ("query", "key", "value")),
    "attn.proj.weight": (f"{_ATTENTION}out/kernel",),
    "attn.proj.bias": (f"{_ATTENTION}out/bias",),
    "norm2.weight": ("LayerNorm_2/scale",),
    "norm2.bias": ("LayerNorm_2/bias",),
    "mlp.fc1.weight": (f"{_FFN}Dense_0/kernel",),
    "mlp.fc1.bias": (f"{_FFN}Dense_0/bias",),
    "mlp.fc2.weight": (f"{_FFN}Dense_1/kernel",),
    "mlp.fc2.bias": (f"{_FFN}Dense_1/bias",),
}


def to_timm(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Google's arrays, in any of their three namings, as timm's tensors; what is not known keeps its name.

    Kernels are (in, out) there, (rows, columns, channels, out) of the patches, and (in, heads, width) or (heads, width,
    out) of attention, which has query, key and value apart. Raises ConversionError for arrays that do not belong
    together. Source: vision.md 3.4.
    """
    try:
        return _renamed({_canonical(name): array for name, array in _unstacked(arrays).items()})
    except (RuntimeError, IndexError, TypeError) as error:
        raise ConversionError(f"these arrays are not those of a ViT: {error}") from error


def _renamed(left: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = {match[1] for match in (re.match(f"{BLOCK}(\\d+)/", name) for name in left) if match}
    names = {
        f"blocks.{i}.{ours}": tuple(f"{BLOCK}{i}/{name}" for name in theirs)
        for i in sorted(blocks, key=int)
        for ours, theirs in PARTS.items()
    }
    state = {}
    for ours, theirs in (STEM | names).items():
        if all(name in left for name in theirs):
            state[ours] = torch.cat([_turned(name, left.pop(name)) for name in theirs]).contiguous()
    return state | left


def _canonical(name: str) -> str:
    """The name as in the first files."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name == "pos_embedding":
        return STEM["pos_embed"][0]
    return "/".join(NEWER.get(part, part) for part in name.split("/"))


def _unstacked(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays with blocks apart."""
    result = {}
    for name, array in arrays.items():
        before, stacked, rest = name.partition(STACKED)
        own = {f"{before}{BLOCK}{i}/{rest}": part for i, part in enumerate(array)} if stacked else {name: array}
        result.update(own)
    return result


def _turned(name: str, array: Tensor) -> Tensor:
    """An array with its axes in torch's order."""
    kind, _, part = name.rpartition("/")
    if kind.endswith(("query", "key", "value")):
        return array.flatten() if part == "bias" else array.flatten(1).T
    if part != "kernel":
        return array
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1)
    return array.flatten(0, 1).T if kind.endswith("/out") else array.t()
