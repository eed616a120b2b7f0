"""RandAugment's ops against Pillow and the published table; the draws of erasing and mixing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from multiway.data.augment import NOWHERE, RandAugment, draw_mix, erase_box
from multiway.data.order import generator
from tests.data.raw import noise

FILL = (124, 116, 104)


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def per_value(picture: Image.Image, value: np.ndarray) -> Image.Image:
    """Every channel value v becomes value[v]."""
    return Image.fromarray(value.astype(np.uint8)[np.array(picture)])


def moved(picture: Image.Image, *numbers: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, numbers, Image.Resampling.BICUBIC, fillcolor=FILL)


def table_at_nine(picture: Image.Image) -> dict[str, list[Image.Image]]:
    """vision.md 2.3 with x = .9: what every op makes of a picture, for both signs where it has one."""
    v = np.arange(256)
    width, height = picture.size
    enhance = {
        "Color": ImageEnhance.Color, "Contrast": ImageEnhance.Contrast, "Brightness": ImageEnhance.Brightness,
        "Sharpness": ImageEnhance.Sharpness,
    }  # fmt: skip
    return {
        "AutoContrast": [ImageOps.autocontrast(picture)],
        "Equalize": [ImageOps.equalize(picture)],
        "Invert": [per_value(picture, 255 - v)],
        "Posterize": [per_value(picture, v & 0b10000000)],  # 4 - int(3.6) = 1 bit
        "Solarize": [per_value(picture, np.where(v < 26, v, 255 - v))],  # 256 - int(230.4) = 26
        "SolarizeAdd": [per_value(picture, np.where(v < 128, np.minimum(v + 99, 255), v))],  # int(110 * .9) = 99
        "Rotate": [picture.rotate(27 * s, Image.Resampling.BICUBIC, fillcolor=FILL) for s in (-1, 1)],
        **{name: [made(picture).enhance(factor) for factor in (0.19, 1.81)] for name, made in enhance.items()},
        "ShearX": [moved(picture, 1, 0.27 * s, 0, 0, 1, 0) for s in (-1, 1)],
        "ShearY": [moved(picture, 1, 0, 0, 0.27 * s, 1, 0) for s in (-1, 1)],
        "TranslateX": [moved(picture, 1, 0, 0.405 * width * s, 0, 1, 0) for s in (-1, 1)],
        "TranslateY": [moved(picture, 1, 0, 0, 0, 1, 0.405 * height * s) for s in (-1, 1)],
    }


def test_every_op_at_magnitude_nine_is_the_table_s_and_all_are_as_likely():
    picture = noise(40, 30)
    expected = {x.tobytes(): (name, i) for name, xs in table_at_nine(picture).items() for i, x in enumerate(xs)}
    assert len(expected) == 6 + 2 * 9
    augment = RandAugment(ops=1, deviation=0.0, chance=1.0, fill=FILL)
    found = Counter[tuple[str, int]]()
    for seed in range(1500):
        image = augment(tensor(picture), generator(seed))
        found[expected[image.permute(1, 2, 0).numpy().tobytes()]] += 1  # a KeyError here is another picture
    assert set(found) == set(expected.values())
    ops = Counter[str]()
    for (name, _), count in found.items():
        ops[name] += count
    assert len(ops) == 15 and all(70 <= count <= 132 for count in ops.values())  # 100 +- 3.3 deviations
    assert all(found[name, 0] > 25 for name in ops) and all(count > 25 for count in found.values())


@pytest.mark.parametrize(("magnitude", "black", "white"), [(10.0, True, False), (0.0, False, False)])
def test_the_ends_of_the_scale(magnitude, black, white):
    """At x = 1 posterize keeps no bit; at x = 0 what has a strength leaves the picture, posterized to 4 bits, alone."""
    picture = noise(24, 24)
    augment = RandAugment(ops=1, magnitude=magnitude, deviation=0.0, chance=1.0)
    found = {augment(tensor(picture), generator(seed)).numpy().tobytes() for seed in range(300)}
    assert (np.zeros((3, 24, 24), np.uint8).tobytes() in found) == black
    if magnitude == 0:
        four_bits = tensor(per_value(picture, np.arange(256) & 0b11110000))
        assert len(found) == 5  # unchanged, 4 bits, and the three without a strength
        assert {x.numpy().tobytes() for x in (tensor(picture), four_bits)} <= found


def test_two_ops_are_drawn_and_half_of_them_applied():
    picture = noise(20, 20)
    image = tensor(picture)
    outputs = [RandAugment()(image, generator(seed)) for seed in range(2000)]
    same = np.mean([torch.equal(output, image) for output in outputs])
    assert same == pytest.approx(0.25, abs=0.03)
    once = {x.tobytes() for xs in table_at_nine(picture).values() for x in xs}
    exact = RandAugment(deviation=0.0, fill=FILL)
    twice = [exact(image, generator(seed)).permute(1, 2, 0).numpy().tobytes() for seed in range(2000)]
    assert np.mean([x in once for x in twice]) == pytest.approx(0.5, abs=0.05)  # the rest: none, or two


def test_the_magnitude_varies_and_is_clipped():
    """An even grey of 130 is brightened by 1 + .9 x with x from N(.9, .05), at most 1; no other op comes near."""
    grey = torch.full((3, 8, 8), 130, dtype=torch.uint8)
    augment = RandAugment(ops=1, chance=1.0, fill=(130, 130, 130))
    values = [int(augment(grey, generator(seed))[0, 0, 0]) for seed in range(4000)]
    bright = [v for v in values if v > 180]
    assert len(bright) / 4000 == pytest.approx(1 / 30, abs=0.01)
    assert max(bright) == 247 and np.mean(bright) == pytest.approx(235.3, abs=1.5)
    assert np.std(bright) == pytest.approx(130 * 0.9 * 0.05, abs=1)


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    magnitude=st.floats(0, 10),
    deviation=st.floats(0, 20),
    seed=st.integers(0, 2**32),
)
def test_any_picture_at_any_magnitude(height, width, magnitude, deviation, seed):
    image = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))
    before = image.clone()
    augment = RandAugment(ops=3, chance=1.0, magnitude=magnitude, deviation=deviation)
    one, two = generator(seed), generator(seed)
    found = augment(image, one)
    assert found.shape == image.shape and found.dtype == torch.uint8
    assert torch.equal(image, before)
    assert torch.equal(found, augment(image, two))
    augment(torch.zeros(3, 5, 5, dtype=torch.uint8), other := generator(seed))
    assert one.random() == other.random()  # one picture takes as many draws as another


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_an_erased_box_lies_in_its_picture_with_the_share_and_aspect_drawn(height, width, seed):
    box = erase_box(height, width, np.random.default_rng(seed))
    top, left, h, w = box
    if box == NOWHERE:
        return
    assert 0 <= top <= height - h and 0 <= left <= width - w and h < height and w < width
    if min(h, w) > 10:
        assert 0.9 * 0.02 <= h * w / (height * width) <= 1.1 / 3
        assert 0.3 * 0.9 <= h / w <= 1.1 / 0.3


def test_erased_boxes_are_uniform_in_area_and_place():
    boxes = np.array([erase_box(400, 400, generator(seed)) for seed in range(3000)])
    assert (boxes[:, 2] > 0).all()
    share = boxes[:, 2] * boxes[:, 3] / 400**2
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.006)
    assert share.min() == pytest.approx(0.02, abs=0.002) and share.max() == pytest.approx(1 / 3, abs=0.003)
    aspect = np.log(boxes[:, 2] / boxes[:, 3])
    assert aspect.mean() == pytest.approx(0, abs=0.04) and aspect.max() == pytest.approx(-np.log(0.3), abs=0.02)
    place = boxes[:, :2] / (400 - boxes[:, 2:])
    assert place.mean(0) == pytest.approx([0.5, 0.5], abs=0.02) and place.max() == 1 and place.min() == 0


def test_a_picture_that_no_box_fits_into_is_left_alone():
    assert erase_box(1, 1, generator(0)) == erase_box(1, 50, generator(0)) == NOWHERE


@given(height=st.integers(1, 64), width=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_the_share_of_cutmix_is_the_area_that_is_left(height, width, seed):
    share, (top, left, h, w) = draw_mix(height, width, 0.0, 1.0, np.random.default_rng(seed))
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
    assert share == pytest.approx(1 - h * w / (height * width)) and (h > 0) == (w > 0)


def test_cutmix_draws_the_area_and_the_centre_uniformly():
    draws = [draw_mix(1000, 1000, 0.0, 1.0, generator(seed)) for seed in range(3000)]
    boxes = np.array([box for _, box in draws])
    inside = boxes[(boxes[:, 0] > 0) & (boxes[:, 1] > 0) & (boxes[:, :2] + boxes[:, 2:] < 1000).all(1)]
    assert np.abs(inside[:, 2] - inside[:, 3]).max() <= 0  # not clipped: a square, as the picture is
    # the side of a box inside has density 2 a (1 - a)^2 (area uniform, times the chance to fit): mean .4
    assert (inside[:, 2] / 1000).mean() == pytest.approx(0.4, abs=0.03)
    assert boxes[:, :2].min() == 0 and (boxes[:, :2] + boxes[:, 2:]).max() == 1000
    centre = (inside[:, :2] + inside[:, 2:] / 2) / 1000
    assert centre.mean(0) == pytest.approx([0.5, 0.5], abs=0.03)


def test_mixup_and_cutmix_take_turns():
    draws = [draw_mix(32, 32, 0.8, 1.0, generator(seed)) for seed in range(3000)]
    blends = [share for share, box in draws if box == NOWHERE and share < 1]
    assert len(blends) / len(draws) == pytest.approx(0.5, abs=0.03)
    # Beta(.8, .8) has mean .5 and variance 1 / (4 (2 .8 + 1))
    assert np.mean(blends) == pytest.approx(0.5, abs=0.03) and np.var(blends) == pytest.approx(1 / 10.4, abs=0.01)
    assert all(draw_mix(32, 32, 0.8, 0.0, generator(seed))[1] == NOWHERE for seed in range(50))
