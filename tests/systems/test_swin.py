"""Swin against the paper and the released files: sizes, names, windows, pictures of any size, start."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from multiway.backbones.swin import Merge, build_swin
from multiway.errors import ConfigError
from multiway.nn.relative import RelativeBias
from multiway.systems.swin import LAYOUTS, PRESETS, Config, Swin
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize

TOY = Config(dim=16, depths=(2, 2), heads=2, window=4, patch=4, image_px=32, classes=5)


def on_meta(config: Config) -> Swin:
    with torch.device("meta"):
        return Swin(config)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def toy(**changes: object) -> Swin:
    return randomize(Swin(dataclasses.replace(TOY, **changes)))  # type: ignore[arg-type,return-value]


def released(dim: int, depths: tuple[int, ...], window: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published file with a 1000-way classifier, without its buffers (vision.md, Appendix A)."""

    def both(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    keys = both("patch_embed.proj", dim, 3, 4, 4) | both("patch_embed.norm", dim)
    for s, depth in enumerate(depths):
        w = dim * 2**s
        for i in range(depth):
            name = f"layers.{s}.blocks.{i}"
            keys |= both(f"{name}.norm1", w) | both(f"{name}.norm2", w)
            keys |= both(f"{name}.attn.qkv", 3 * w, w) | both(f"{name}.attn.proj", w, w)
            keys |= {f"{name}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, w // 32)}
            keys |= both(f"{name}.mlp.fc1", 4 * w, w) | both(f"{name}.mlp.fc2", w, 4 * w)
        if s < len(depths) - 1:
            keys |= both(f"layers.{s}.downsample.norm", 4 * w)
            keys |= {f"layers.{s}.downsample.reduction.weight": (2 * w, 4 * w)}
    return keys | both("norm", 8 * dim) | both("head", 1000, 8 * dim)


@pytest.mark.parametrize(
    ("preset", "total"),
    [
        ("swin_tiny_patch4_window7_224", 28_288_354),
        ("swin_small_patch4_window7_224", 49_606_258),
        ("swin_base_patch4_window7_224", 87_768_224),
        ("swin_base_patch4_window12_384", 87_903_584),
        ("swin_large_patch4_window7_224", 196_532_476),
        ("swin_large_patch4_window12_384", 196_735_516),
    ],
)
def test_presets_have_the_published_sizes_names_and_shapes(preset: str, total: int) -> None:
    config = PRESETS[preset]
    model = on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == total
    theirs = {key: tuple(x.shape) for key, x in to_theirs(model.state_dict(), LAYOUTS["official"]).items()}
    assert theirs == released(config.dim, config.depths, config.window)


def test_the_22k_classifier_makes_base_109_million() -> None:
    model = on_meta(dataclasses.replace(PRESETS["swin_base_patch4_window7_224"], classes=21_841))
    assert sum(p.numel() for p in model.parameters()) == 109_130_249


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_is_lossless_and_drops_buffers(layout: str) -> None:
    model, weights = toy(depths=(2, 2, 2)), LAYOUTS[layout]
    theirs = to_theirs(model.state_dict(), weights)
    assert len(theirs) == len(model.state_dict()) + (4 * model.layers if layout == "transformers" else 0)
    place = "swin.encoder.layers.0.blocks.1.attention.self" if layout == "transformers" else "layers.0.blocks.1.attn"
    buffers = {f"{place}.relative_position_index": torch.zeros(16, 16)}
    if layout == "official":
        buffers["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    back = to_ours(theirs | buffers, weights, model.state_dict())
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    merged = {"official": "layers.1.downsample", "timm": "layers.2.downsample"}
    name = merged.get(layout, "swin.encoder.layers.1.downsample") + ".reduction.weight"
    assert torch.equal(theirs[name], model.encoder.stages[1].merge.project.linear.weight)


def test_windows_are_no_larger_than_their_maps() -> None:
    model = on_meta(Config(window=12, image_px=192))
    assert [stage.window for stage in model.encoder.stages] == [12, 12, 12, 6]
    assert model.encoder.stages[3].blocks[1].attention.bias.table.shape == (11 * 11, 24)
    model = on_meta(Config(image_px=(192, 96)))
    assert model.encoder.grids((192, 96)) == [(48, 24), (24, 12), (12, 6), (6, 3)]
    assert [stage.window for stage in model.encoder.stages] == [7, 7, 6, 3]


@pytest.mark.parametrize(("px", "shifts"), [(32, [2, 0]), (33, [2, 2]), ((64, 16), [0, 0]), ((40, 20), [2, 0])])
def test_every_second_block_shifts_where_a_map_is_larger_than_its_window(px, shifts) -> None:
    model = toy()
    seen = []
    for stage in model.encoder.stages:
        for block in stage.blocks:
            block.attention.register_forward_pre_hook(lambda own, args: seen.append(args[1].apart))
    size = px if isinstance(px, tuple) else (px, px)
    model.encode(image=draw(1, 3, *size))
    assert [apart is not None for apart in seen] == [False, shifts[0] > 0, False, shifts[1] > 0]


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (16, 64), (5, 3)])
def test_pictures_of_any_size_are_read_as_if_padded_to_whole_patches(size: tuple[int, int]) -> None:
    model = toy()
    pixels = model.pixels(draw(2, 3, *size))
    whole = [-(-n // 4) * 4 for n in size]
    padded = torch.zeros(2, 3, *whole)
    padded[:, :, : size[0], : size[1]] = pixels
    got = model.encode(image=pixels)
    rows, columns = model.encoder.grids(size)[-1]
    assert got.values.shape == (2 * rows * columns, 32)
    assert torch.equal(got.values, model.encode(image=padded).values)
    logits = model.classify(pixels)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    torch.testing.assert_close(model.head(got.values.view(2, -1, 32).mean(1)), logits)


def test_a_picture_does_not_see_its_batch() -> None:
    model = toy()
    image = draw(3, 3, 45, 32)
    together = model.encode(image=image).values.view(3, -1, 32)
    for i in range(3):
        alone = model.encode(image=image[i : i + 1]).values
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-5)


def test_merging_concatenates_by_columns_first_and_pads_odd_maps() -> None:
    x = torch.arange(15.0).view(1, 3, 5, 1)
    merged = Merge(torch.nn.Identity())(x)
    assert merged.shape == (1, 2, 3, 4)
    assert merged[0, 0, 0].tolist() == [0, 5, 1, 6]
    assert merged[0, 1, 2].tolist() == [14, 0, 0, 0]


def test_features_are_the_maps_of_all_stages() -> None:
    model = toy()
    maps = model.features(draw(2, 3, 50, 37))
    assert [x.shape for x in maps] == [(2, 16, 13, 10), (2, 32, 7, 5)]
    tokens = model.encode(image=draw(2, 3, 50, 37)).values
    last = model.encoder.norm(maps[-1].permute(0, 2, 3, 1))
    assert torch.equal(last.flatten(0, 2), tokens)
    assert model.encoder.stride == 8 and model.encoder.width == 32


def test_hidden_patches_are_replaced_behind_their_norm() -> None:
    encoder = randomize(build_swin(image_px=32, patch=4, dim=16, depths=(2, 2), heads=2, window=4, hide_token=True))
    image, noise = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hide = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    pixels = hide.view(2, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    out = encoder(image, hide=hide)
    assert torch.equal(encoder(torch.where(pixels, noise, image), hide=hide), out)
    assert not torch.allclose(encoder(torch.where(pixels, image, noise), hide=hide), out, atol=1e-2)
    assert torch.equal(encoder(image, hide=torch.zeros_like(hide)), encoder(image))
    assert torch.equal(encoder.tokens(image, hide).flatten(1, 2)[hide][0], encoder.hide_token[0, 0])  # type: ignore


def test_another_size_resizes_windows_and_tables() -> None:
    model = toy()
    image = draw(2, 3, 32, 32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    out = model.classify(image)
    model.set_image_size(32)
    assert torch.equal(model.classify(image), out)
    model.set_image_size((96, 64), window=8)
    assert model.config.image_px == (96, 64) and model.config.window == 8
    assert [stage.window for stage in model.encoder.stages] == [8, 8]
    for name, x in model.state_dict().items():
        if not name.endswith("bias.table"):
            assert torch.equal(x, before[name])
            continue
        assert x.shape == (15 * 15, before[name].shape[1])
        torch.testing.assert_close(x[7 * 15 + 7], before[name][3 * 7 + 3], rtol=0, atol=1e-6)  # the offset 0
    assert model.classify(draw(2, 3, 96, 64)).isfinite().all()
    fresh = Swin(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.classify(image), model.classify(image))


def test_a_resized_model_trains_its_tables() -> None:
    model = toy()
    model.set_image_size(64, window=8)
    model.classify(draw(2, 3, 64, 64)).square().sum().backward()
    tables = [module.table for module in model.modules() if isinstance(module, RelativeBias)]
    assert len(tables) == 4 and all(table.grad is not None and table.grad.any() for table in tables)


def test_layers_and_decay_are_those_of_the_recipes() -> None:
    model = on_meta(PRESETS["swin_tiny_patch4_window7_224"])
    assert model.layers == model.config.depth == 12
    layers = {
        "encoder.embed.weight": 0,
        "encoder.embed_norm.bias": 0,
        "encoder.hide_token": 0,
        "encoder.stages.0.blocks.0.attention.qkv.weight": 1,
        "encoder.stages.1.blocks.1.ffn.fc1.weight": 4,
        "encoder.stages.0.merge.project.norm.weight": 2,
        "encoder.stages.2.merge.project.linear.weight": 10,
        "encoder.stages.3.blocks.1.attention.bias.table": 12,
        "encoder.norm.weight": 13,
        "head.weight": 13,
    }
    assert {name: model.layer_of(name) for name in layers} == layers
    assert set(map(model.layer_of, dict(model.named_parameters()))) == set(range(14))
    kept = {name for name, p in model.named_parameters() if p.ndim > 1 and model.no_decay(name)}
    assert kept == {name for name, _ in model.named_parameters() if name.endswith("attention.bias.table")}


def test_stochastic_depth_rises_over_all_stages() -> None:
    rates = [block.drop_rate for block in on_meta(PRESETS["swin_small_patch4_window7_224"]).encoder.blocks]
    assert len(rates) == 24
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, 24))


def test_draws_drop_branches_of_their_sample() -> None:
    model = toy(drop_path=0.5)
    image = draw(3, 3, 32, 32)
    keep = torch.full((8, 3), 0.9)
    before = model.classify(image, keep)
    for branch in range(2, 8):
        draws = keep.clone()
        draws[branch, 1] = 0.01
        changed = (model.classify(image, draws) - before).abs().amax(1) > 1e-4
        assert changed.tolist() == [False, True, False]


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    model = Swin(dataclasses.replace(TOY, dim=64))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    model.init_weights()
    for name, x in model.named_parameters():
        assert x.isfinite().all(), name
        if "embed." in name:
            assert x.abs().max() <= 1 / math.sqrt(48)  # as PyTorch starts a convolution of 3 * 4 * 4 inputs
        elif x.ndim > 1:
            assert 0.017 < x.std() < 0.023, name
        else:
            assert (x == float("norm" in name and name.endswith("weight"))).all(), name


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="divisible by heads"):
        Swin(dataclasses.replace(TOY, heads=3))
    with pytest.raises(ConfigError, match="window"):
        Swin(dataclasses.replace(TOY, window=0))
    with pytest.raises(ConfigError, match="no classifier"):
        Swin(dataclasses.replace(TOY, classes=0)).classify(draw(1, 3, 32, 32))
