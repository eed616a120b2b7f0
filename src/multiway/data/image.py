"""Pictures: from bytes that nobody vouches for to uint8 tensors, and the views of them that models see."""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from multiway.data.augment import RandAugment
from multiway.errors import ConfigError, RecordError

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""

ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
CONVERTED_MODES = ("CMYK", "YCbCr", "LAB", "HSV")
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEG = b"\xff\xd8"
JPEG_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)
JPEG_PLAIN = frozenset((0xFFC4, 0xFFDB, 0xFFDD, 0xFFE0, *range(0xFFE2, 0xFFF0), 0xFFFE))
"""Segments that say nothing about how to read the pixels but what every decoder of JPEGs knows."""
JPEG_SCAN = 0xFFDA
SEGMENT = struct.Struct(">HHBHHB")
"""Marker, length; and of a frame: bits, height, width, channels."""
CROP_TRIES = 10
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picture may be at most, checked from its header before a pixel is decoded.

    ``max_bytes``: of the encoded file; ``max_pixels``: width times height of the first frame; ``max_side``: pixels;
    ``max_aspect``: long side over short side; ``formats``: Pillow's names of the formats that may be opened at all.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 32_768
    max_aspect: float = 50.0
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

    def check_bytes(self, count: int) -> None:
        """Raise RecordError (``empty``, ``bytes``) unless an encoded picture may have this size."""
        if count == 0:
            raise RecordError("expected a picture, found 0 bytes", reason="empty")
        if count > self.max_bytes:
            raise RecordError(f"picture of {count} bytes, at most {self.max_bytes} are allowed", reason="bytes")

    def check_size(self, width: int, height: int) -> None:
        """Raise RecordError (``no_pixels``, ``side``, ``pixels``, ``aspect``) unless a picture may be this large."""
        size = f"picture of {width}x{height} pixels"
        if width < 1 or height < 1:
            raise RecordError(f"{size} has no pixels", reason="no_pixels")
        if max(width, height) > self.max_side:
            raise RecordError(f"{size}, sides of at most {self.max_side} are allowed", reason="side")
        if width * height > self.max_pixels:
            raise RecordError(f"{size}, at most {self.max_pixels} pixels are allowed", reason="pixels")
        if max(width, height) > self.max_aspect * min(width, height):
            raise RecordError(f"{size}, at most {self.max_aspect:g} times longer than wide is allowed", reason="aspect")


DEFAULT_LIMITS = Limits()


Decoder = Literal["pillow", "simplejpeg"]
"""Who decodes plain JPEGs. Both are libjpeg-turbo and give the same pixels; other versions of it may round otherwise,
so a run keeps the one it began with."""


class Decoded(NamedTuple):
    """A decoded picture: ``image`` uint8 (3, H, W), RGB, upright; ``notes``: what was changed to make it so."""

    image: Tensor
    notes: tuple[str, ...]


def decode(
    data: bytes, *, limits: Limits = DEFAULT_LIMITS, px: int | None = None, decoder: Decoder = "pillow"
) -> Decoded:
    """Decode untrusted bytes to an upright RGB picture; the bytes decide the format, not a file name.

    ``px``: how many pixels both sides need at least; a JPEG that is twice (4, 8 times) larger is decoded at a half
    (quarter, eighth) of its size. None decodes every pixel. Colour profiles and metadata are ignored. ``decoder``: who
    decodes JPEGs that are grey or RGB, intact and without EXIF; Pillow decodes everything else. In memory the channels
    of a pixel lie together, as decoders write them and `resize` reads them fastest.

    Notes: ``animated_first_frame`` (later frames or pages are ignored), ``sixteen_bit`` (the high byte is kept),
    ``transparent`` (laid over BACKGROUND), ``cmyk``, ``ycbcr``, ``lab``, ``hsv`` (converted), ``rotated`` (turned as
    its EXIF says), ``exif_unreadable`` (taken as it lies).

    Raises RecordError with one of the reasons ``empty``, ``bytes``, ``unreadable`` (no allowed format), ``no_pixels``,
    ``side``, ``pixels``, ``aspect``, ``truncated``, ``corrupt``, ``mode`` (32-bit integer or float pixels, which have
    no known range); ConfigError when the decoder is not installed.
    """
    if decoder == "simplejpeg" and (pixels := _by_simplejpeg(data, limits, px)) is not None:
        return Decoded(torch.from_numpy(pixels).permute(2, 0, 1), ())
    picture, notes = open_picture(data, limits, px)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of bytes that nobody may write; nobody but us has them
        # four bytes a pixel, as Pillow holds them: packing three would be a pass over the picture
        rgbx = torch.frombuffer(picture.tobytes("raw", "RGBX"), dtype=torch.uint8)
    return Decoded(rgbx.view(*picture.size[::-1], 4).permute(2, 0, 1)[:3], notes)


def open_picture(data: bytes, limits: Limits, px: int | None = None) -> tuple[Image.Image, tuple[str, ...]]:
    """`decode` by Pillow before it becomes a tensor: a loaded RGB picture and its notes."""
    limits.check_bytes(len(data))
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=limits.formats)
            limits.check_size(*picture.size)
            if getattr(picture, "is_animated", False):
                notes.append("animated_first_frame")
            if px is not None:
                picture.draft(None, (px, px))
            picture.load()
            return _upright(_rgb(picture, notes), picture, notes), tuple(notes)
    except RecordError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RecordError(f"picture with too many pixels: {error}", reason="pixels") from error
    except Image.UnidentifiedImageError as error:
        allowed = ", ".join(limits.formats)
        raise RecordError(f"not a picture in {allowed}: begins with {data[:16]!r}", reason="unreadable") from error
    except Exception as error:  # a decoder may raise anything at hostile bytes
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise RecordError(f"{reason} picture: {type(error).__name__}: {error}", reason=reason) from error


def _by_simplejpeg(data: bytes, limits: Limits, px: int | None) -> np.ndarray | None:
    """Pixels of a plain JPEG, uint8 (H, W, 3), at the scale Pillow would take; None = Pillow has to look at it."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        raise ConfigError('the decoder simplejpeg is not installed: pip install "multiway[fast]"') from error
    size = _plain_jpeg(data) if "JPEG" in limits.formats else None
    if size is None or math.prod(size) > DEFAULT_LIMITS.max_pixels:  # above, Pillow has a limit of its own
        return None
    times = 1 if px is None else min(size) // px
    scale = next((scale for scale in (8, 4, 2) if scale <= times), 1)
    width, height = (-(-side // scale) for side in size)
    try:
        limits.check_bytes(len(data))
        limits.check_size(*size)
        pixels = np.empty((height, width, 3), np.uint8)  # what does not fit into it is not decoded
        found = decode_jpeg(data, min_height=height, min_width=width, buffer=pixels)
    except (RecordError, ValueError):  # a refusal, also of what Pillow forgives: Pillow has the last word
        return None
    return pixels if found.shape == pixels.shape else None


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG of 8 bits, grey or RGB, baseline or progressive, without EXIF; None for all else."""
    at, size = 2, None
    while data.startswith(JPEG) and at + SEGMENT.size <= len(data):
        marker, length, bits, height, width, channels = SEGMENT.unpack_from(data, at)
        if marker == JPEG_SCAN:
            return size
        if marker in JPEG_FRAMES and size is None and bits == 8 and channels in (1, 3):
            size = width, height
        elif marker not in JPEG_PLAIN or data.startswith(b"MPF", at + 4):  # several pictures in one file
            return None
        at += 2 + length
    return None


def _rgb(picture: Image.Image, notes: list[str]) -> Image.Image:
    """RGB from every mode that has a known range; the rules are in `decode`."""
    mode = picture.mode
    if mode.startswith("I;16"):
        notes.append("sixteen_bit")
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise RecordError(f"pixels of mode {mode!r} have no known range, expected 8 or 16 bits", reason="mode")
    if mode in ALPHA_MODES or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*BACKGROUND, 255)), picture)
    elif mode in CONVERTED_MODES:
        notes.append(mode.lower())
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _upright(rgb: Image.Image, picture: Image.Image, notes: list[str]) -> Image.Image:
    """The picture turned as its EXIF orientation says; read after loading, when every decoder knows its metadata."""
    try:
        turn = ORIENTATIONS.get(picture.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001  broken metadata is common and no reason to lose the picture
        notes.append("exif_unreadable")
        return rgb
    if turn is None:
        return rgb
    notes.append("rotated")
    return rgb.transpose(turn)


Size = int | tuple[int, int]
"""Pixels of a square's side, or (height, width)."""

Interpolation = Literal["bicubic", "bilinear"]


def sides(px: Size) -> tuple[int, int]:
    """Height and width."""
    return (px, px) if isinstance(px, int) else px


def resize(image: Tensor, px: Size, interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize uint8 (3, H, W) to (3, *sides(px)): antialiased, the aspect ratio is not kept."""
    if image.shape[1:] == sides(px):
        return image
    stride = image.stride()
    if stride[0] == 1 and stride[2] == 4 and image.storage_offset() % 4 == 0:
        image = image.as_strided((4, *image.shape[1:]), stride)  # with the fourth byte of `decode` nothing is copied
    sized = F.interpolate(image[None], size=sides(px), mode=interpolation, antialias=True, align_corners=False)
    return sized[0, :3]


def centre_crop(image: Tensor, px: Size, share: float, interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize uint8 (3, H, W) so that its shorter side is int(px / share), and take the centre: (3, px, px).

    For a height and a width: so that it just covers int(side / share) of both. Source: vision.md 2.3, evaluation.
    """
    (_, height, width), (h, w) = image.shape, sides(px)
    covered = int(h / share), int(w / share)
    if height * covered[1] <= width * covered[0]:  # relatively lower than asked for: the height decides
        covered = covered[0], width * covered[0] // height
    else:
        covered = height * covered[1] // width, covered[1]
    top, left = round((covered[0] - h) / 2), round((covered[1] - w) / 2)
    return resize(image, covered, interpolation)[:, top : top + h, left : left + w]


def hflip(image: Tensor) -> Tensor:
    """Mirror (3, H, W) left to right."""
    return image.flip(-1)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a crop with a share ``scale`` of the area and width over height in ``ratio``.

    The ratio is log-uniform; of CROP_TRIES draws the first that fits is taken, else the largest centred box of an
    allowed ratio. The number of values taken from ``rng`` is always the same.
    """
    draws = rng.random(2 * CROP_TRIES + 2).tolist()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, shape in zip(draws[:CROP_TRIES], draws[CROP_TRIES:-2], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
    allowed = min(max(width / height, ratio[0]), ratio[1])
    h = max(1, min(height, round(width / allowed)))
    w = max(1, min(width, round(height * allowed)))
    return (height - h + 1) // 2, (width - w + 1) // 2, h, w


def random_resized_crop(
    image: Tensor,
    px: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Crop uint8 (3, H, W) by `crop_box` and resize the crop to (3, *sides(px))."""
    top, left, height, width = crop_box(image.shape[1], image.shape[2], scale, ratio, rng)
    return resize(image[:, top : top + height, left : left + width], px, interpolation)


def colour_jitter(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Scale brightness, contrast and saturation of uint8 (3, H, W), in random order.

    Each factor is uniform in [1 - strength, 1 + strength]; hue stays.

    Source: BEiT's ColorJitter(0.4, 0.4, 0.4); here all three run in float and are rounded once.
    """
    order = rng.permutation(3)
    factors = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength, size=3).tolist()
    x = image.float()
    luma = torch.tensor(LUMA).view(3, 1, 1)
    for which in order:
        grey = (x * luma).sum(0, keepdim=True) if which else x.new_zeros(())
        centre = grey.mean() if which == 1 else grey  # black, the mean grey, each pixel's own grey
        x = torch.lerp(centre, x, factors[which]).clamp_(0.0, 255.0)
    return x.round_().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class View:
    """How a picture is shown to a model: ``view(image, rng)`` maps uint8 (3, H, W) to uint8 (3, *sides(px)).

    ``scale``: range of the crop's share of the area, None = no random crop; ``ratio``: range of the crop's width over
    height; ``share``: px over the side that pictures are resized to before their centre is taken, 1 = no larger than
    needed (evaluation). With neither the whole picture is squeezed. ``flip``: probability of mirroring; ``augment``:
    what is done then; ``jitter``: strength of colour jitter, 0 = none, and none beside ``augment``. A view without
    randomness needs no ``rng``. Raises ConfigError for a crop that is both random and central, and for a share that
    is none.
    """

    px: Size
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    share: float | None = None
    interpolation: Interpolation = "bicubic"
    flip: float = 0.0
    augment: RandAugment | None = None
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.share is not None and (self.scale is not None or not 0 < self.share <= 1):
            raise ConfigError(f"a view's share is above 0 and at most 1, and goes without a scale; found {self}")

    @property
    def source_px(self) -> int:
        """Side a picture needs so that an average crop is not enlarged: the ``px`` to decode at."""
        side = max(sides(self.px))
        if self.share is not None:
            return math.ceil(side / self.share)
        share = 1.0 if self.scale is None else sum(self.scale) / 2
        return math.ceil(side / math.sqrt(share))

    def __call__(self, image: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Return the view; the same generator state gives the same view of pictures of the same size."""
        if rng is None:
            if self.scale or self.flip or self.augment or self.jitter:
                raise ValueError(f"{self} is random and needs an rng")
            return self.whole(image)
        if self.scale is None:
            image = self.whole(image)
        else:
            image = random_resized_crop(image, self.px, self.scale, self.ratio, rng, self.interpolation)
        if self.flip and rng.random() < self.flip:
            image = hflip(image)
        if self.augment is not None:
            return self.augment(image, rng)
        return colour_jitter(image, self.jitter, rng) if self.jitter else image

    def whole(self, image: Tensor) -> Tensor:
        """The picture or its centre, without randomness."""
        if self.share is None:
            return resize(image, self.px, self.interpolation)
        return centre_crop(image, self.px, self.share, self.interpolation)
