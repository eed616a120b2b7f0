"""The faster decoder of plain JPEGs: Pillow's pixels, notes and refusals; and how pictures lie in memory."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from multiway.data.collate import DualCollate, Sample, Words
from multiway.data.image import Decoded, Limits, decode, hflip, resize
from multiway.errors import ConfigError, RecordError
from tests.data.raw import encode, noise

TOLERANCE = 3  # of 255

PLAIN = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "finest": {"quality": 100},
    "coarse": {"quality": 20},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "rgb": {"keep_rgb": True},
    "profile": {"icc_profile": bytes(range(256)) * 300},
    "comment": {"comment": b"\xff\xd8\xff\xc0 not a picture"},
}


def rough(width: int = 53, height: int = 41, seed: int = 0) -> Image.Image:
    """Every pixel another colour: the hardest case for two decoders to agree on."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def outcome(data: bytes, decoder: str, **options) -> Decoded | str:
    """What decoding gives: a picture with notes, or the reason why not."""
    try:
        return decode(data, decoder=decoder, **options)
    except RecordError as error:
        return error.reason


def assert_agree(data: bytes, **options) -> None:
    """Both decoders give the same picture and notes, or the same reason."""
    fast, plain = outcome(data, "simplejpeg", **options), outcome(data, "pillow", **options)
    if isinstance(fast, str) or isinstance(plain, str):
        assert fast == plain
    else:
        assert fast.notes == plain.notes and fast.image.shape == plain.image.shape
        assert (fast.image.int() - plain.image.int()).abs().max() <= TOLERANCE


@pytest.fixture
def fast(monkeypatch) -> list:
    """What simplejpeg decoded."""
    simplejpeg = pytest.importorskip("simplejpeg")
    done, inner = [], simplejpeg.decode_jpeg

    def watched(data, **options):
        done.append(inner(data, **options).shape)
        return options["buffer"]

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    return done


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "RGB") for kind in PLAIN), ("finest", "L"), ("progressive", "L")])
def test_plain_jpegs_look_as_pillow_decodes_them(kind, mode, fast):
    data = encode(rough().convert(mode), "JPEG", **PLAIN[kind])
    for px, size in ((None, (41, 53)), (100, (41, 53)), (21, (41, 53)), (20, (21, 27)), (10, (11, 14)), (5, (6, 7))):
        assert_agree(data, px=px)
        assert fast == [(*size, 3)]
        fast.clear()


@pytest.mark.parametrize(
    ("data", "notes"),
    [
        (encode(noise()), ()),
        (encode(noise(), "WEBP"), ()),
        (encode(noise(53, 41).convert("CMYK"), "JPEG"), ("cmyk",)),
        (encode(noise(53, 41), "JPEG", exif=exif(1)), ()),
        (encode(noise(53, 41), "JPEG", exif=exif(6)), ("rotated",)),
        (encode(noise(53, 41), "JPEG", exif=exif(2)), ("rotated",)),
        (encode(noise(53, 41), "MPO", save_all=True, append_images=[noise(53, 41, 1)]), ("animated_first_frame",)),
    ],
)
def test_everything_else_is_left_to_pillow(data, notes, fast):
    found = decode(data, decoder="simplejpeg")
    assert found.notes == notes and not fast
    assert torch.equal(found.image, decode(data).image)


def test_limits_hold_for_every_decoder(fast):
    data = encode(noise(40, 10), "JPEG")
    for limits, reason in (
        (Limits(max_bytes=len(data) - 1), "bytes"),
        (Limits(max_pixels=399), "pixels"),
        (Limits(max_side=39), "side"),
        (Limits(max_aspect=3.9), "aspect"),
        (Limits(formats=("PNG",)), "unreadable"),
    ):
        assert outcome(data, "simplejpeg", limits=limits) == outcome(data, "pillow", limits=limits) == reason
    assert not fast
    exact = Limits(max_bytes=len(data), max_pixels=400, max_side=40, max_aspect=4.0, formats=("JPEG",))
    assert decode(data, limits=exact, decoder="simplejpeg").image.shape == (3, 10, 40) and fast


def test_a_header_that_lies_gets_no_memory(fast):
    """The second of two frame headers says 3.6 gigapixels."""
    data = encode(noise(40, 10), "JPEG")
    frame = data.index(b"\xff\xc0")
    size = data[frame : frame + 19]
    huge = size[:5] + b"\xea\x60\xea\x60" + size[9:]
    for lie in (data[:frame] + huge + data[frame:], data[: frame + 19] + huge + data[frame + 19 :]):
        assert_agree(lie, limits=Limits(max_pixels=10**6))
        assert_agree(lie, limits=Limits(max_pixels=10**10, max_side=10**5))
    assert not fast


@given(data=st.data(), kind=st.sampled_from(sorted(PLAIN)), px=st.sampled_from([None, 5, 10, 20]))
def test_broken_jpegs_end_alike(data, kind, px):
    pytest.importorskip("simplejpeg")
    broken = bytearray(encode(rough(), "JPEG", **PLAIN[kind]))
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, min(len(broken), 900) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(broken)))
    assert_agree(
        bytes(broken[: data.draw(st.sampled_from([len(broken), cut]))]), px=px, limits=Limits(max_pixels=10**6)
    )


def test_a_decoder_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ConfigError, match=r"simplejpeg is not installed: pip install \"multiway\[fast\]\""):
        decode(encode(noise(), "JPEG"), decoder="simplejpeg")


@pytest.mark.parametrize("box", [(0, 0, 41, 53), (3, 5, 20, 30), (40, 52, 1, 1), (0, 7, 41, 1), (9, 0, 1, 53)])
def test_resizing_does_not_depend_on_how_a_picture_lies(box):
    top, left, height, width = box
    decoded = decode(encode(rough())).image
    packed = torch.from_numpy(np.array(rough())).permute(2, 0, 1)
    for px in (16, 64):
        crops = (x[:, top : top + height, left : left + width] for x in (decoded, packed, packed.contiguous()))
        first, *others = (resize(crop, px) for crop in crops)
        assert first.shape == (3, px, px) and all(torch.equal(first, other) for other in others)
        assert torch.equal(hflip(first)[:, :, 0], first[:, :, -1])


def test_a_batch_lies_alike_however_its_pictures_lay():
    words = Words(bos=0, eos=1, mask_id=9, first=2, stop=9, longest=8, window=8)
    collate = DualCollate(words=words, grid=(2, 2))
    pictures = [decode(encode(rough(32, 32, seed))).image for seed in range(3)]
    text = np.array([3, 4])
    for lain in (pictures, [x.contiguous() for x in pictures], [pictures[0], *(x.contiguous() for x in pictures[1:])]):
        batch = collate({"pair": [Sample(image=x, text=text) for x in lain]})
        assert batch["image"].is_contiguous() and torch.equal(batch["image"], torch.stack(pictures))
    assert batch["text"].tolist() == [0, 3, 4, 1] * 3 and batch["text"].dtype == torch.int64


def test_framed_texts_are_cut_to_the_longest_of_their_kind():
    words = Words(bos=0, eos=1, mask_id=9, first=2, stop=9, longest=4, window=5)
    ids = np.arange(2, 9, dtype=np.int32)
    assert words.framed(ids, "pair").tolist() == [0, 2, 3, 1]
    assert words.framed(ids, "text").tolist() == [0, 2, 3, 4, 1]
    assert words.framed(ids[:0], "pair").tolist() == [0, 1] and words.framed(ids, "text").dtype == np.int64
