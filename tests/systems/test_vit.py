"""ViT against its paper: sizes, other pictures, what a class is read from, start, layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multiway import pretrained
from multiway.errors import ConfigError
from multiway.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from multiway.nn.position import resize_positions
from multiway.systems.vit import PRESETS, Config, ViT
from tests.contracts.toys import randomize

TOY = Config(dim=32, depth=3, heads=4, hidden=64, patch=8, image_px=32, classes=7)
POOLS = pytest.mark.parametrize("pool", ["cls", "mean"])


def toy(**changes: object) -> ViT:
    model = ViT(dataclasses.replace(TOY, **changes))
    randomize(model)
    return model.eval()


def pictures(height: int = 32, width: int = 32, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("preset", "total"),
    [  # vision.md 3.1: with a classifier of 1000 classes, at 224 pixels
        ("tiny_patch16", 5_717_416),
        ("small_patch16", 22_050_664),
        ("base_patch32", 88_224_232),
        ("base_patch16", 86_567_656),
        ("base_patch8", 86_576_872),
        ("large_patch16", 304_326_632),
        ("large_patch14", 304_203_752),
        ("huge_patch14", 632_045_800),
        ("g_patch14", 1_012_611_432),
        ("gigantic_patch14", 1_844_440_680),
    ],
)
def test_sizes_are_the_published_ones(preset: str, total: int) -> None:
    with torch.device("meta"):
        model = ViT(PRESETS[f"vit_{preset}_224"])
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_without_a_classifier_there_is_the_backbone_alone() -> None:
    with torch.device("meta"):
        model = ViT(dataclasses.replace(PRESETS["vit_base_patch16_224"], classes=0))
    assert sum(parameter.numel() for parameter in model.parameters()) == 85_798_656
    with pytest.raises(ConfigError, match="no classifier"):
        toy(classes=0).classify(pictures())


def test_every_preset_is_whole() -> None:
    """Fine-tuned MAE's have the widths of the plain ones; pixels are a picture of whole patches."""
    for name, config in PRESETS.items():
        assert config.hidden in (4 * config.dim, 6144, 8192), name
        side = name.removesuffix("_mean").rpartition("_")[2]
        assert config.image_px == int(side) and config.image_px % config.patch == 0
        if name.endswith("_mean"):
            same = dataclasses.replace(PRESETS[name.removesuffix("_mean")], pool="mean", mean=IMAGENET_MEAN)
            assert dataclasses.replace(same, std=IMAGENET_STD, share=config.share, head_std=2e-5) == config


@pytest.mark.parametrize("wrong", [{"dim": 30}, {"image_px": 30}, {"image_px": (32, 20)}, {"image_px": 0}])
def test_a_shape_that_does_not_fit_together_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="divisible by heads|whole patches of 8"):
        ViT(dataclasses.replace(TOY, **wrong))


# --- what a class is read from ----------------------------------------------------------------------------------------


def test_the_class_is_read_from_the_normed_class_token() -> None:
    model = toy()
    tokens = model.norm(model.encoder(model.pixels(pictures())))
    assert torch.equal(model.encode(image=pictures()).dense("image")[0], tokens)
    torch.testing.assert_close(model.classify(pictures()), model.head(tokens[:, 0]))
    assert torch.equal(model.patches(model.encode(image=pictures())), tokens[:, 1:])


def test_or_from_the_norm_of_the_patches_mean() -> None:
    model = toy(pool="mean")
    tokens = model.encoder(model.pixels(pictures()))
    torch.testing.assert_close(model.classify(pictures()), model.head(model.norm(tokens[:, 1:].mean(1))))


@POOLS
def test_vectors_have_unit_length_and_are_of_one_picture_each(pool: str) -> None:
    model, image = toy(pool=pool), pictures()
    vectors = model.embed(model.encode(image=image))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.embed(model.encode(image=image[1:2])), vectors[1:2])


def test_bytes_are_normalised_and_floats_are_such_already() -> None:
    model, image = toy(mean=IMAGENET_MEAN, std=IMAGENET_STD), pictures()
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    normalised = (image / 255 - mean) / std
    torch.testing.assert_close(model.pixels(image), normalised, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.classify(normalised), model.classify(image))


# --- other sizes ------------------------------------------------------------------------------------------------------


@POOLS
@pytest.mark.parametrize("size", [64, (32, 48), (16, 8)])
def test_other_sizes_are_read_after_one_call_and_saved(pool: str, size: int | tuple[int, int], tmp_path: Path) -> None:
    """Positions as whoever published such weights resizes them: timm's kernel, or the plain one of MAE."""
    model = toy(pool=pool)
    height, width = (size, size) if isinstance(size, int) else size
    positions = model.encoder.positions.detach().clone()
    with pytest.raises(ConfigError, match=r"expected \(32, 32\): call set_image_size"):
        model.classify(pictures(height, width))
    model.set_image_size(size)
    grid = height // 8, width // 8
    want = resize_positions(positions, (4, 4), grid, 1, antialias=pool == "cls")
    assert isinstance(model.encoder.positions, nn.Parameter) and torch.equal(model.encoder.positions, want)
    scores = model.classify(pictures(height, width))
    pretrained.save_pretrained(model, tmp_path)
    again = pretrained.load(tmp_path)
    assert again.model.config.image_px == again.preprocessor.image_px == size
    with torch.no_grad():
        assert torch.equal(again.model.classify(pictures(height, width)), scores)
    with pytest.raises(ConfigError, match="whole patches of 8"):
        model.set_image_size(33)


def test_its_own_size_changes_nothing() -> None:
    model = toy()
    scores = model.classify(pictures())
    for size in (32, (32, 32)):
        model.set_image_size(size)
        assert torch.equal(model.classify(pictures()), scores)


def test_a_picture_that_is_wide_is_not_read_as_one_that_is_high() -> None:
    model, image = toy(image_px=(32, 48)), pictures(32, 48)
    with pytest.raises(ConfigError, match=r"\(48, 32\) pixels, expected \(32, 48\)"):
        model.classify(image.mT)


# --- start, layers ----------------------------------------------------------------------------------------------------


def test_weights_start_normal_and_the_classifier_as_the_config_says() -> None:
    model = ViT(Config(dim=192, depth=2, heads=3, hidden=768, image_px=64, classes=500, head_std=2e-5))
    torch.manual_seed(0)
    model.init_weights()
    for name, parameter in model.named_parameters():
        std = parameter.std().item()
        if name == "encoder.cls_token":
            assert 0 < std < 2e-6
        elif name == "head.weight":
            assert std == pytest.approx(2e-5, rel=0.02)
        elif parameter.ndim > 1:
            assert std == pytest.approx(0.02, rel=0.05), name
            assert parameter.abs().max() > 0.05, f"{name} is cut"
        elif "norm.weight" in name:
            assert (parameter == 1).all()
        else:
            assert not parameter.any(), name


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.embed.weight", 0),
        ("encoder.cls_token", 0),
        ("encoder.positions", 0),
        ("encoder.blocks.0.attention.qkv.norm.weight", 1),
        ("encoder.blocks.2.ffn.fc2.bias", 3),
        ("norm.weight", 4),
        ("head.weight", 4),
    ],
)
def test_layers_are_numbered_from_the_patches(name: str, layer: int) -> None:
    """vision.md 4.3."""
    model = toy()
    assert name in dict(model.named_parameters())
    assert model.layer_of(name) == layer and model.layers == 3


def test_positions_and_class_token_do_not_decay() -> None:
    model = toy()
    spared = {name for name, _ in model.named_parameters() if model.no_decay(name)}
    assert spared == {"encoder.positions", "encoder.cls_token"}


def test_blocks_are_dropped_more_often_the_deeper_they_are() -> None:
    model = toy(drop_path=0.2)
    assert [block.drop_rate for block in model.encoder.blocks] == [0, 0.1, 0.2]
    draws = torch.ones(6, 3)
    draws[2:, 1] = 0.05  # below the rates of the second and third block: the second picture leaves their branches out
    model.encoder.blocks[0].drop_rate = 0.0
    first = model.encoder.run(model.encoder.tokens(model.pixels(pictures())), blocks=slice(0, 1))
    found = model.classify(pictures(), draws)
    torch.testing.assert_close(found[1], model.head(model.norm(first[1, 0])))
    assert not torch.allclose(found[0], model.classify(pictures())[0]), "what is kept is scaled"
