"""Views of pictures that are stored with their visual tokens, so that no tokenizer runs while training."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multiway.data.image import Size, View, crop_box, hflip, resize
from multiway.data.order import generator

BATCH = 256
"""Pictures whose codes are computed at once."""

COLUMNS = ("box", "flip", "code")


@dataclass(frozen=True)
class StoredViews:
    """K views of each of N pictures: where to crop, whether to mirror, and the codes of what is then seen.

    ``box``: int32 (N, K, 4), top, left, height, width in pixels; ``flip``: bool (N, K); ``code``: int32 (N, K, P).
    Columns are read from disk as they are needed.
    """

    box: np.ndarray
    flip: np.ndarray
    code: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> StoredViews:
        """Map the columns of a folder that `store_views` wrote."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMNS))

    def draw(self, image: Tensor, record: int, px: Size, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One of the views of a picture, uint8 (3, px, px), and its codes, int64 (P,)."""
        k = int(rng.integers(self.box.shape[1]))
        seen = seen_in(image, self.box[record, k], bool(self.flip[record, k]), px)
        return seen, torch.from_numpy(self.code[record, k].astype(np.int64))


def seen_in(image: Tensor, box: Iterable[int], flip: bool, px: Size) -> Tensor:
    """The part of a picture in a box (top, left, height, width), mirrored or not: uint8 (3, px, px)."""
    top, left, height, width = (int(x) for x in box)
    seen = resize(image[:, top : top + height, left : left + width], px)
    return hflip(seen) if flip else seen


def store_views(
    folder: Path,
    images: Callable[[int], Tensor],
    count: int,
    tokenizer: Callable[[Tensor], Tensor],
    view: View,
    *,
    views: int,
    seed: int,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> StoredViews:
    """Draw K views of every picture, compute their codes, and keep both in ``folder`` (written aside, then renamed).

    ``images``: record -> uint8 (3, H, W); ``tokenizer``: uint8 (B, 3, px, px) -> int64 (B, P); ``view``: how views are
    drawn (colour jitter is left to training: codes are those of the true colours); ``track``: wraps the iteration to
    show progress. A folder that is already there is opened as it is, also one that another run made meanwhile.
    """
    if folder.is_dir():
        return StoredViews.open(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    columns: dict[str, np.ndarray] = {}
    step = max(1, BATCH // views)
    for first in track(range(0, count, step)):
        seen, boxes, flips = [], [], []
        for record in range(first, min(count, first + step)):
            image = images(record)
            for k in range(views):
                rng = generator(seed, "view", record, k)
                _, height, width = image.shape
                box = (0, 0, height, width)
                if view.scale is not None:
                    box = crop_box(height, width, view.scale, view.ratio, rng)
                boxes.append(box)
                flips.append(bool(rng.random() < view.flip))
                seen.append(seen_in(image, box, flips[-1], view.px))
        codes = tokenizer(torch.stack(seen)).cpu().numpy()
        for name, rows in zip(
            COLUMNS, (np.array(boxes, np.int32), np.array(flips), codes.astype(np.int32)), strict=True
        ):
            rows = rows.reshape(-1, views, *rows.shape[1:])
            if name not in columns:
                shape = (count, *rows.shape[1:])
                columns[name] = np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", rows.dtype, shape)
            columns[name][first : first + len(rows)] = rows
    for column in columns.values():
        column.flush()  # type: ignore[attr-defined]
    try:
        temporary.replace(folder)
    except OSError:  # another run was faster
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)
    return StoredViews.open(folder)


def views_hash(folder: Path) -> str:
    """SHA-256 of the stored columns."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        with (folder / f"{name}.npy").open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
