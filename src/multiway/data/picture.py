"""One picture in whatever form it is handed over: a file, its bytes, a Pillow picture, a tensor."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from multiway.data.image import CONVERTED_MODES, Limits, Size, View, decode
from multiway.data.records import read_bytes
from multiway.errors import ConfigError, MissingInputError, RecordError

Picture = str | Path | bytes | Image.Image | Tensor
"""A file, the bytes of one, a Pillow picture, or uint8 (3, H, W), RGB."""


def whole_picture(picture: Picture, px: Size, share: float | None = None) -> Tensor:
    """The whole picture as a model sees it, uint8 (3, px, px), by the rules of `multiway.data.image` in every form.

    ``share``: as in `View`; None = the whole picture is squeezed.

    Raises MissingInputError for a file that is not there, RecordError for one that is not a usable picture, ConfigError
    for another tensor.
    """
    view = View(px=px, share=share)
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3:
            found = f"{picture.dtype} {tuple(picture.shape)}"
            raise ConfigError(f"a picture as a tensor is uint8 (3, H, W), RGB; this one is {found}")
        return view(picture)
    if isinstance(picture, Image.Image):
        picture = _encoded(picture)
    if isinstance(picture, bytes):
        return view(decode(picture, px=view.source_px).image)
    if not Path(picture).exists():
        raise MissingInputError(f"{picture}: no such picture")
    try:
        data = read_bytes(Path(picture).resolve(), most=Limits().max_bytes).data
        return view(decode(data, px=view.source_px).image)
    except RecordError as error:
        raise RecordError(f"{picture}: {error}", reason=error.reason) from error


def _encoded(picture: Image.Image) -> bytes:
    """A Pillow picture as a file, so that it is read by the rules of all files (transparency, 16 bits, orientation)."""
    if picture.mode in CONVERTED_MODES:
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    try:
        picture.save(buffer, "PNG", compress_level=0, exif=picture.getexif())
    except OSError as error:
        raise RecordError(f"pixels of mode {picture.mode!r} have no known range: {error}", reason="mode") from error
    return buffer.getvalue()
