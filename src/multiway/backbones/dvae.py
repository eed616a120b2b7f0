"""The encoder of DALL-E's discrete VAE (Ramesh et al., 2021, arXiv 2102.12092): the visual tokens of BEiT and FLAVA.

Its training was never released. The safe source of its weights is the hub's ``facebook/flava-image-codebook``; OpenAI's
own files are pickled modules, whose tensors are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from multiway.errors import ConfigError, ConversionError

STRIDE = 8
"""Pixels of a side of what one token stands for, in the picture the encoder sees."""

LOBES = 3
"""Of the Lanczos window, on either side."""

PUBLISHED = (
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"blocks\.input\.", "stem."),
    (r"blocks\.output\.conv\.", "head."),
    (r"blocks\.group_(\d)\.(?:group\.)?block_(\d)\.", r"stages.\1.\2."),
    (r"id_path\.", "shortcut."),
    (r"res_path\.(?:path\.)?conv_(\d)\.", r"convs.\1."),
)
"""Names in published files, OpenAI's and the hub's -> ours, as substitutions in order; numbers begin at 1."""


class Cell(nn.Module):
    """``shortcut(x) + gain * conv(conv(conv(conv(x))))``, ReLU in front of each; three see 3x3, the last widens."""

    def __init__(self, width: int, dim: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        inner = dim // 4
        self.shortcut = nn.Conv2d(width, dim, 1) if width != dim else nn.Identity()
        self.convs = nn.ModuleDict(
            {
                "1": nn.Conv2d(width, inner, 3, padding=1),
                "2": nn.Conv2d(inner, inner, 3, padding=1),
                "3": nn.Conv2d(inner, inner, 3, padding=1),
                "4": nn.Conv2d(inner, dim, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, width, H, W) -> (B, dim, H, W)."""
        branch = x
        for conv in self.convs.values():
            branch = conv(branch.relu())
        return self.shortcut(x) + self.gain * branch


class DiscreteVAE(nn.Module):
    """The encoder as an `ImageTokenizer`, for models whose patches have ``patch`` pixels.

    ``codes``: size of the vocabulary; ``dim``: width of the first of the 4 stages, each is twice as wide as the one
    before; ``depth``: cells of each. Source: masked.md 3.
    """

    def __init__(self, patch: int = 16, codes: int = 8192, dim: int = 256, depth: int = 2) -> None:
        super().__init__()
        self.codes = codes
        self.patch = patch
        widths, gain = [dim, dim, 2 * dim, 4 * dim, 8 * dim], (4 * depth) ** -2
        self.stem = nn.Conv2d(3, dim, 7, padding=3)

        def stage(width: int, dim: int) -> nn.ModuleDict:
            return nn.ModuleDict({str(i): Cell(width if i == 1 else dim, dim, gain) for i in range(1, depth + 1)})

        self.stages = nn.ModuleDict({str(i): stage(widths[i - 1], widths[i]) for i in range(1, 5)})
        self.head = nn.Conv2d(widths[-1], codes, 1)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W), H and W multiples of ``patch`` -> int64 (B, P), P row-major.

        The picture is made smaller (Lanczos) where patches have more pixels than tokens stand for, as 224 to 112. BEiT
        makes both from the original instead, which differs by the roundings in between. Raises ConfigError for floats.
        """
        if image.dtype != torch.uint8:
            raise ConfigError(f"these visual tokens are those of bytes, 0 to 255; the picture is {image.dtype}")
        size = [side * STRIDE // self.patch for side in image.shape[2:]]
        return self.logits(0.8 / 255 * lanczos(image, size[0], size[1]) + 0.1).argmax(1).flatten(1)

    def logits(self, x: Tensor) -> Tensor:
        """Scores of all codes: float (B, 3, h, w) in [.1, .9] -> (B, codes, h / 8, w / 8)."""
        x = self.stem(x)
        for number, stage in self.stages.items():
            for cell in stage.values():  # type: ignore[operator]
                x = cell(x)
            x = nn.functional.max_pool2d(x, 2) if number != "4" else x
        return self.head(x.relu())

    def load_published(self, state: Mapping[str, Tensor]) -> DiscreteVAE:
        """Take the weights of a published file, whose own names are listed in PUBLISHED; returns self.

        Raises ConversionError naming what is missing, unexpected, or of another shape.
        """
        renamed = {}
        for name, tensor in state.items():
            for pattern, ours in PUBLISHED:
                name = re.sub(pattern, ours, name)
            renamed[name] = tensor
        try:
            self.load_state_dict(renamed)
        except RuntimeError as error:
            raise ConversionError(f"these weights are not those of DALL-E's encoder: {error}") from error
        return self


def lanczos(image: Tensor, height: int, width: int) -> Tensor:
    """Make pictures smaller as Pillow's LANCZOS does, rows first: uint8 (B, C, H, W) -> float32 (B, C, height, width),
    whole numbers from 0 to 255.
    """
    right, down = _lanczos(image.shape[3], width).to(image.device), _lanczos(image.shape[2], height).to(image.device)
    wide = (image.float() @ right.T).round().clamp(0, 255)
    return (down @ wide).round().clamp(0, 255)


def _lanczos(old: int, new: int) -> Tensor:
    """Weights of the old places for every new one along a side: (new, old), rows sum to 1."""
    scale = old / new
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    apart = (torch.arange(old, dtype=torch.float64) + 0.5 - centre[:, None]) / max(1.0, scale)
    weights = torch.sinc(apart) * torch.sinc(apart / LOBES) * (apart.abs() < LOBES)
    return (weights / weights.sum(1, keepdim=True)).float()
