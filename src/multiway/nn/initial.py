"""First weights that several systems share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from multiway.nn.linear import QueryKeyValue
from multiway.nn.relative import RelativeBias


@torch.no_grad()
def init_cut_normal(encoder: Any, std: float, layer_scale: float) -> None:
    """BEiT's start of a ViT: weights and tokens normal of deviation ``std``, cut at one deviation (which leaves .54 of
    it), then `rescale_by_depth`; biases, also relative ones, 0; norms 1 and 0; LayerScale's factors ``layer_scale``.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | QueryKeyValue):
            nn.init.trunc_normal_(module.weight, std=std, a=-std, b=std)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, RelativeBias):
            nn.init.zeros_(module.table)
    for name, parameter in encoder.named_parameters():
        if name.endswith("_token"):
            nn.init.trunc_normal_(parameter, std=std, a=-std, b=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "gamma" in name:
            nn.init.constant_(parameter, layer_scale)
    rescale_by_depth(encoder.blocks)


@torch.no_grad()
def rescale_by_depth(blocks: Iterable[Any]) -> None:
    """Divide what block l (from 1) adds to its input by sqrt(2 l): the last weights of its attention and its FFN.

    Source: vision.md 2.1; BEiT's line.
    """
    for layer, block in enumerate(blocks, start=1):
        for name, parameter in block.named_parameters():
            if name.endswith(".out.weight") or (name.startswith("ffn.") and name.endswith(".fc2.weight")):
                parameter.div_(math.sqrt(2 * layer))
