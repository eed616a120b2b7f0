"""Decoding by fixed rules, and views that are functions of their generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from multiway.data.augment import RandAugment
from multiway.data.image import Limits, View, colour_jitter, crop_box, decode, hflip, random_resized_crop, resize
from multiway.errors import ConfigError, RecordError
from tests.data.raw import encode, noise


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def test_the_pixels_of_a_lossless_file_arrive_unchanged():
    image, notes = decode(encode(noise()))
    assert image.dtype == torch.uint8 and image.shape == (3, 12, 20) and notes == ()
    assert torch.equal(image, pixels(noise()))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_every_allowed_format_is_decoded(kind):
    picture = Image.new("RGB", (16, 8), (200, 60, 20))
    image, _ = decode(encode(picture, kind))
    assert (image.float() - pixels(picture).float()).abs().max() <= 4


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "EPS", "JPEG2000", "PDF"])
def test_no_other_format_is_decoded(kind):
    with pytest.raises(RecordError) as error:
        decode(encode(Image.new("RGB", (16, 16)), kind))
    assert error.value.reason == "unreadable" and "JPEG, PNG" in str(error.value)


# D8: golden pixels of every mode
@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected", "note"),
    [
        ("L", 77, "PNG", (77, 77, 77), ()),
        ("1", 1, "PNG", (255, 255, 255), ()),
        ("RGBA", (100, 0, 200, 255), "PNG", (100, 0, 200), ()),
        ("RGBA", (100, 0, 200, 0), "PNG", (255, 255, 255), ("transparent",)),
        ("RGBA", (0, 0, 0, 51), "PNG", (204, 204, 204), ("transparent",)),
        ("LA", (100, 0), "PNG", (255, 255, 255), ("transparent",)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0), ("cmyk",)),
        ("CMYK", (255, 255, 255, 255), "TIFF", (0, 0, 0), ("cmyk",)),
        ("YCbCr", (128, 128, 128), "TIFF", (128, 128, 128), ("ycbcr",)),
        ("LAB", (0, 128, 128), "TIFF", (0, 0, 0), ("lab",)),
        ("I;16", 0x80FF, "PNG", (128, 128, 128), ("sixteen_bit",)),
        ("I;16", 0x80FF, "TIFF", (128, 128, 128), ("sixteen_bit",)),
    ],
)
def test_each_mode_becomes_rgb_by_its_rule(mode, colour, kind, expected, note):
    image, notes = decode(encode(Image.new(mode, (6, 4), colour), kind))
    worst = 1 if mode == "LAB" else 0  # goes through colour management
    assert (image[:, 2, 3].int() - torch.tensor(expected)).abs().max() <= worst
    assert notes == note


@pytest.mark.parametrize(("mode", "colour"), [("I", 70000), ("F", 0.5)])
def test_pixels_without_a_known_range_are_refused(mode, colour):
    with pytest.raises(RecordError, match=f"mode '{mode}'") as error:
        decode(encode(Image.new(mode, (4, 4), colour), "TIFF"))
    assert error.value.reason == "mode"


def test_transparent_palette_and_key_colours_show_the_background():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 200, 100, 0])
    assert decode(encode(palette)).image[:, 0, 0].tolist() == [200, 100, 0]
    for data in (encode(palette, transparency=1), encode(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))):
        image, notes = decode(data)
        assert image.unique().tolist() == [255] and notes == ("transparent",)


def test_inverted_cmyk_of_a_jpeg_is_read_as_colour():
    image, notes = decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert notes == ("cmyk",)
    assert (image[:, 4, 4].int() - torch.tensor([255, 0, 0])).abs().max() <= 4


# D9
def test_sixteen_bits_keep_their_levels():
    ramp = np.linspace(0, 65535, 256 * 16).astype(np.uint16).reshape(16, 256)
    image, notes = decode(encode(Image.fromarray(ramp)))
    assert notes == ("sixteen_bit",) and len(image[0].unique()) == 256
    assert torch.equal(image[0], torch.from_numpy((ramp >> 8).astype(np.uint8)))


# D10
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation, kind):
    turn = Image.Transpose
    stored = {  # what a camera held so would have written
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    picture = noise() if orientation == 1 else noise().transpose(stored[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    image, notes = decode(encode(picture, kind, exif=exif, **options))
    assert torch.equal(image, pixels(noise()))
    if kind != "TIFF":  # libtiff's reader turns by itself
        assert notes == (("rotated",) if orientation > 1 else ())


def test_broken_metadata_cost_a_note_and_not_the_picture():
    image, notes = decode(encode(noise(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert torch.equal(image, pixels(noise()))
    assert notes in ((), ("exif_unreadable",))


# D7
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_taken_and_counted(kind):
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    image, notes = decode(encode(first, kind, save_all=True, append_images=[second]))
    assert notes == ("animated_first_frame",)
    assert (image[:, 8, 8].int() - torch.tensor([255, 0, 0])).abs().max() <= 4


# D11
def test_profiles_and_metadata_change_no_pixel():
    plain = decode(encode(noise())).image
    assert torch.equal(decode(encode(noise(), icc_profile=b"not a profile" * 9)).image, plain)


@pytest.mark.parametrize(("side", "px", "expected"), [(256, 256, 256), (256, 129, 256), (256, 128, 128), (256, 20, 32)])
def test_a_large_jpeg_is_decoded_no_smaller_than_asked(side, px, expected):
    data = encode(noise(side, side), "JPEG", quality=95)
    image, _ = decode(data, px=px)
    assert image.shape == (3, expected, expected)
    assert (resize(image, 32).float() - resize(decode(data).image, 32).float()).abs().mean() < 3


def test_limits_come_from_the_header():
    data = encode(noise(40, 10))
    for limits, reason in (
        (Limits(max_bytes=len(data) - 1), "bytes"),
        (Limits(max_pixels=399), "pixels"),
        (Limits(max_side=39), "side"),
        (Limits(max_aspect=3.9), "aspect"),
        (Limits(formats=("JPEG",)), "unreadable"),
    ):
        with pytest.raises(RecordError) as error:
            decode(data, limits=limits)
        assert error.value.reason == reason
    exact = Limits(max_bytes=len(data), max_pixels=400, max_side=40, max_aspect=4.0, formats=("PNG",))
    assert decode(data, limits=exact).image.shape == (3, 10, 40)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("px", [24, (24, 40), (70, 20)])
def test_resizing_agrees_with_pillow(px, interpolation):
    picture = noise(61, 47)
    size = (px, px) if isinstance(px, int) else px[::-1]
    expected = pixels(picture.resize(size, Image.Resampling[interpolation.upper()])).int()
    for image in (pixels(picture), decode(encode(picture)).image):  # the second with its fourth byte
        assert (resize(image, px, interpolation).int() - expected).abs().max() <= 2


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    low=st.floats(0.01, 1.0),
    widest=st.floats(1.0, 4.0),
    seed=st.integers(0, 2**32),
)
def test_a_crop_lies_in_its_picture_with_the_share_and_ratio_drawn(height, width, low, widest, seed):
    rng, twin = np.random.default_rng(seed), np.random.default_rng(seed)
    top, left, h, w = crop_box(height, width, (low, 1.0), (1 / widest, widest), rng)
    assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1
    crop_box(7, 300, (0.9, 1.0), (1.0, 1.0), twin)
    assert rng.bit_generator.state == twin.bit_generator.state  # one picture takes as many draws as another
    if min(h, w) > 20 and (h, w) != (height, width):
        assert 0.9 / widest <= w / h <= widest * 1.1
    if low < 0.6 and min(height, width) > 100 and max(height, width) < 1.5 * min(height, width):
        assert h * w >= 0.9 * low * height * width


def test_crops_cover_the_picture_evenly():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(100, 100, (0.25, 0.25), (1.0, 1.0), rng) for _ in range(4000)])
    assert (boxes[:, 2:] == 50).all()
    assert boxes[:, :2].min() == 0 and boxes[:, :2].max() == 50
    assert abs(boxes[:, :2].mean() - 25) < 0.6


def test_a_crop_is_the_resized_box():
    image = pixels(noise(60, 40))
    box = crop_box(40, 60, (0.2, 0.8), (3 / 4, 4 / 3), np.random.default_rng(5))
    crop = random_resized_crop(image, 16, (0.2, 0.8), (3 / 4, 4 / 3), np.random.default_rng(5))
    top, left, height, width = box
    assert torch.equal(crop, resize(image[:, top : top + height, left : left + width].contiguous(), 16))


def test_mirroring_twice_is_nothing():
    image = pixels(noise())
    assert not torch.equal(hflip(image), image)
    assert torch.equal(hflip(hflip(image)), image)
    assert torch.equal(hflip(image)[:, :, 0], image[:, :, -1])


def test_jitter_of_no_strength_is_nothing():
    image = pixels(noise())
    assert torch.equal(colour_jitter(image, 0.0, np.random.default_rng(0)), image)


def test_jitter_moves_light_contrast_and_colour_within_its_strength():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)  # of an even grey only the brightness can change
    values = [int(colour_jitter(image, 0.4, np.random.default_rng(i)).float().mean()) for i in range(300)]
    assert 58 <= min(values) <= 65 and 135 <= max(values) <= 142
    grey = pixels(noise().convert("L").convert("RGB"))
    for seed in range(20):
        jittered = colour_jitter(grey, 0.4, np.random.default_rng(seed))
        assert jittered.dtype == torch.uint8
        assert (jittered[0].int() - jittered[1].int()).abs().max() <= 1  # grey stays grey
    colourful = pixels(noise())
    spread = [colour_jitter(colourful, 0.4, np.random.default_rng(i)).float().std() for i in range(20)]
    assert min(spread) < colourful.float().std() < max(spread)


def test_a_view_is_a_function_of_its_generator():
    image = pixels(noise(90, 70))
    view = View(px=32, scale=(0.2, 1.0), flip=0.5, jitter=0.4)
    first = view(image, np.random.default_rng(3))
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, view(image, np.random.default_rng(3)))
    assert not torch.equal(first, view(image, np.random.default_rng(4)))


def test_an_evaluation_view_is_the_whole_picture():
    image = pixels(noise(90, 70))
    assert torch.equal(View(px=32)(image), resize(image, 32))
    assert torch.equal(View(px=32, flip=1.0)(image, np.random.default_rng(0)), hflip(resize(image, 32)))
    with pytest.raises(ValueError, match="needs an rng"):
        View(px=32, flip=0.5)(image)


def test_a_view_asks_for_as_many_pixels_as_its_crops_need():
    assert View(px=224).source_px == 224
    assert View(px=224, scale=(0.5, 0.5)).source_px == 317
    assert View(px=(160, 224), scale=(0.5, 0.5)).source_px == 317
    assert View(px=224, share=0.875).source_px == 256


def evaluated(picture: Image.Image, shorter: int, px: int) -> torch.Tensor:
    """The usual evaluation by Pillow: resize the shorter side, crop the centre."""
    width, height = picture.size
    size = (shorter, height * shorter // width) if width <= height else (width * shorter // height, shorter)
    left, top = (round((side - px) / 2) for side in size)
    return pixels(picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + px, top + px)))


@pytest.mark.parametrize(("width", "height"), [(90, 70), (70, 95), (64, 64), (33, 41), (300, 20)])
@pytest.mark.parametrize(("px", "share", "shorter"), [(56, 0.875, 64), (48, 0.875, 54), (56, 0.9, 62), (48, 1.0, 48)])
def test_an_evaluation_crop_is_the_centre_of_the_resized_picture(width, height, px, share, shorter):
    """int(256 / 224 * 56) = 64, int(256 / 224 * 48) = 54, int(56 / .9) = 62."""
    picture = noise(width, height)
    seen = View(px=px, share=share)(pixels(picture))
    assert seen.shape == (3, px, px)
    assert (seen.int() - evaluated(picture, shorter, px).int()).abs().max() <= 2


@given(
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    px=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    share=st.floats(0.3, 1.0),
)
def test_an_evaluation_crop_of_any_shape_lies_in_its_picture(size, px, share):
    image = torch.full((3, *size), 7, dtype=torch.uint8)
    assert torch.equal(View(px=px, share=share)(image), torch.full((3, *px), 7, dtype=torch.uint8))


def test_a_crop_of_another_shape_covers_the_picture_as_far_as_it_can():
    """A 20 x 60 ramp seen at 10 x 20 is halved, not squeezed: the middle two thirds of its columns are seen."""
    ramp = (torch.arange(60, dtype=torch.uint8) * 4).expand(3, 20, 60)
    seen = View(px=(10, 20), share=1.0)(ramp)[0, 5].float()
    torch.testing.assert_close(seen, 4 * (torch.arange(20) * 2 + 10.5), atol=1.01, rtol=0)


@pytest.mark.parametrize("fields", [{"share": 0.9, "scale": (0.5, 1.0)}, {"share": 0.0}, {"share": 1.5}])
def test_a_share_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ConfigError, match="share is above 0 and at most 1, and goes without a scale"):
        View(px=32, **fields)


def test_augmentation_comes_after_the_flip_and_instead_of_jitter():
    image, augment = pixels(noise(40, 30)), RandAugment(chance=1.0)
    rng = np.random.default_rng(2)
    rng.random()  # the flip's
    expected = augment(hflip(resize(image, (24, 32))), rng)
    view = View(px=(24, 32), flip=1.0, augment=augment, jitter=0.9)
    assert torch.equal(view(image, np.random.default_rng(2)), expected)
    with pytest.raises(ValueError, match="needs an rng"):
        View(px=32, augment=augment)(image)


def test_a_random_crop_may_be_bilinear_and_of_any_shape():
    image = pixels(noise(60, 40))
    seen = View(px=(16, 24), scale=(0.67, 1.0), interpolation="bilinear")(image, np.random.default_rng(5))
    top, left, height, width = crop_box(40, 60, (0.67, 1.0), (3 / 4, 4 / 3), np.random.default_rng(5))
    box = image[:, top : top + height, left : left + width]
    assert torch.equal(seen, resize(box, (16, 24), "bilinear")) and not torch.equal(seen, resize(box, (16, 24)))
