"""Batches of pictures alone: what is hidden, kept, erased and mixed comes from the samples, however they are split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway.data.collate import Sample
from multiway.data.hide import hide_blocks, hide_cells, hide_patches
from multiway.data.order import generator
from multiway.data.pictures import LabelCollate, PictureCollate
from multiway.errors import ConfigError
from multiway.objectives.mixing import erase, mix

HEIGHT, WIDTH, GRID = 24, 16, (6, 4)
ALL = {"erase": 0.6, "mixup": 0.8, "cutmix": 1.0, "branches": 4}


def samples(count: int, first: int = 0, **fields: Any) -> dict[str, list[Sample]]:
    """Fresh ones: the same number gives the same picture and the same generator."""

    def one(i: int) -> Sample:
        image = torch.from_numpy(np.random.default_rng(i).integers(0, 256, (3, HEIGHT, WIDTH), dtype=np.uint8))
        return Sample(image=image, label=i % 7, record=i, rng=generator(0, i), **fields)

    return {"image": [one(i) for i in range(first, first + count)]}


def joined(parts: list[dict[str, Tensor]], patches: int) -> dict[str, Tensor]:
    """Batches of consecutive samples as one."""
    whole = {key: torch.cat([part[key] for part in parts], dim=int(key == "drop_path")) for key in parts[0]}
    if "image_hidden" in whole:
        sizes = np.cumsum([0, *(len(part["image"]) * patches for part in parts[:-1])])
        whole["image_hidden"] = torch.cat([part["image_hidden"] + n for part, n in zip(parts, sizes.tolist())])
    return whole


@pytest.mark.parametrize(
    "collate",
    [
        PictureCollate(),
        PictureCollate(hide=partial(hide_patches, GRID, 0.75), keep=True, branches=4),
        PictureCollate(hide=partial(hide_cells, GRID, 2, 0.5)),
        LabelCollate(),
        LabelCollate(**ALL),
    ],
    ids=["plain", "keep", "cells", "label", "all"],
)
def test_a_batch_does_not_depend_on_how_a_step_is_split(collate: Callable[..., dict[str, Tensor]]) -> None:
    whole = collate(samples(12))
    parts = joined([collate(samples(4, first)) for first in (0, 4, 8)], 24)
    assert list(whole) == list(parts)
    for key, value in whole.items():
        assert value.is_contiguous() and value.dtype == parts[key].dtype
        assert torch.equal(value, parts[key]), key


def test_pictures_without_hiding_are_pictures() -> None:
    batch = PictureCollate()(samples(3))
    assert set(batch) == {"image", "sample"} and batch["sample"].tolist() == [0, 1, 2]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (3, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("hide", "hidden"),
    [
        (partial(hide_patches, GRID, 0.75), 18),
        (partial(hide_cells, GRID, 2, 0.6), 16),
        (partial(hide_blocks, GRID, 10, 2), 10),
    ],
    ids=["patches", "cells", "blocks"],
)
def test_hidden_and_visible_patches_are_told_in_every_form(hide: Callable[..., np.ndarray], hidden: int) -> None:
    batch = PictureCollate(hide=hide, keep=True)(samples(5))
    assert set(batch) == {"image", "sample", "image_hide", "image_hidden", "image_keep"}
    assert batch["image_hide"].dtype == torch.bool and batch["image_hide"].shape == (5, 24)
    assert (batch["image_hide"].sum(1) == hidden).all()
    assert batch["image_hidden"].dtype == batch["image_keep"].dtype == torch.int64
    assert torch.equal(batch["image_hidden"], batch["image_hide"].flatten().nonzero().flatten())
    for row, keep in zip(batch["image_hide"], batch["image_keep"], strict=True):
        assert keep.tolist() == (~row).nonzero().flatten().tolist()
    assert len({tuple(row) for row in batch["image_hide"].tolist()}) > 1  # each picture its own


def test_visible_patches_are_only_listed_where_they_are_as_many() -> None:
    cut = partial(hide_cells, (5, 5), 2, 0.5)
    assert PictureCollate(hide=cut)(samples(6))["image_hide"].shape == (6, 25)
    with pytest.raises(ConfigError, match="visible patches.*cells that divide"):
        PictureCollate(hide=cut, keep=True)(samples(6))


def test_stored_codes_and_drop_path_come_along() -> None:
    codes = torch.arange(24)
    batch = PictureCollate(hide=partial(hide_patches, GRID, 0.5), branches=6)(samples(3, code=codes))
    assert torch.equal(batch["image_code"], codes.expand(3, -1))
    assert batch["drop_path"].shape == (6, 3) and batch["drop_path"].dtype == torch.float32
    assert "image_code" not in PictureCollate()(samples(3))


def test_classes_alone_draw_nothing() -> None:
    batch = LabelCollate()(samples(9))
    assert set(batch) == {"image", "sample", "label"}
    assert batch["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1] and batch["label"].dtype == torch.int64


def test_erased_boxes_come_with_as_much_noise() -> None:
    batch = LabelCollate(erase=0.25)(samples(400))
    box, noise = batch["erase_box"], batch["erase_noise"]
    assert box.shape == (400, 4) and box.dtype == torch.int64
    assert (box[:, 2] > 0).float().mean() == pytest.approx(0.25, abs=0.07)
    assert ((box[:, :2] + box[:, 2:]) <= torch.tensor([HEIGHT, WIDTH])).all()
    assert noise.shape == (3 * int((box[:, 2] * box[:, 3]).sum()),) and noise.dtype == torch.float32
    assert noise.mean() == pytest.approx(0, abs=0.03) and noise.std() == pytest.approx(1, abs=0.03)
    assert "mix_box" not in batch


def test_both_of_a_pair_have_the_mix_that_its_first_sample_drew() -> None:
    batch = LabelCollate(mixup=0.8, cutmix=1.0)(samples(200))
    share, box = batch["mix_share"], batch["mix_box"]
    assert share.shape == (200,) and share.dtype == torch.float32 and box.shape == (200, 4) and box.dtype == torch.int64
    assert torch.equal(share[::2], share[1::2]) and torch.equal(box[::2], box[1::2])
    cut = box[:, 2] > 0
    assert 60 < cut.sum() < 140
    torch.testing.assert_close(share[cut], 1 - (box[:, 2] * box[:, 3])[cut] / (HEIGHT * WIDTH))
    assert len(share[::2].unique()) > 70
    swapped = {"image": [x for i in range(0, 8, 2) for x in (samples(8)["image"][i], samples(1, 100 + i)["image"][0])]}
    other = LabelCollate(mixup=0.8, cutmix=1.0)(swapped)  # other second samples
    assert torch.equal(other["mix_share"], share[:8]) and torch.equal(other["mix_box"], box[:8])


def test_a_picture_without_a_neighbour_is_refused_where_they_are_mixed() -> None:
    assert len(LabelCollate(erase=0.5)(samples(5))["label"]) == 5
    for changes in ({"mixup": 0.8}, {"cutmix": 1.0}):
        with pytest.raises(ConfigError, match="micro-batch has 5.*even number of pictures.*set both to 0"):
            LabelCollate(**changes)(samples(5))


def test_the_draws_fit_what_is_done_with_them() -> None:
    """Normalise, erase, mix: CutMix's share is the part of the pixels that stays one's own."""
    batch = LabelCollate(**ALL)(samples(60))
    x = torch.arange(60.0)[:, None, None, None].expand(60, 3, HEIGHT, WIDTH).contiguous()
    erased = erase(x, batch["erase_box"], batch["erase_noise"] + 100)
    areas = batch["erase_box"][:, 2] * batch["erase_box"][:, 3]
    assert torch.equal((erased != x).sum((1, 2, 3)), 3 * areas)
    mixed = mix(x, batch["mix_share"], batch["mix_box"])
    cut = batch["mix_box"][:, 2] > 0
    torch.testing.assert_close((mixed == x).float().mean((1, 2, 3))[cut], batch["mix_share"][cut])
