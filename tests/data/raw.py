"""Small pictures, shards and folders for the tests of data."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """A picture as the bytes of a file."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def noise(width: int = 20, height: int = 12, seed: int = 0) -> Image.Image:
    """Smooth colours that differ everywhere, so that a turn or a swap shows."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(seed: int = 0) -> bytes:
    """A small picture, another one for every seed."""
    return encode(noise(seed=seed))


def shard(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """Write a tar of (name, content)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of ``count`` pairs."""
    pairs = ((f"{i:03d}.png", png(i), f"{i:03d}.txt", f"picture {i}".encode()) for i in range(first, first + count))
    return [member for a, b, c, d in pairs for member in ((a, b), (c, d))]


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below a new root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root
