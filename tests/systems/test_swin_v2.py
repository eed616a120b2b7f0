"""Swin V2 against the paper and the released files: sizes, names, start, transfer to other windows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from multiway.errors import ConfigError
from multiway.nn.window import ContinuousBias
from multiway.systems.swin_v2 import LAYOUTS, PRESETS, Config, SwinV2
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize

TOY = Config(dim=16, depths=(2, 2), heads=2, window=4, patch=4, image_px=32, classes=5)


def on_meta(config: Config) -> SwinV2:
    with torch.device("meta"):
        return SwinV2(config)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def toy(**changes: object) -> SwinV2:
    return randomize(SwinV2(dataclasses.replace(TOY, **changes)))  # type: ignore[arg-type,return-value]


def biases(model: SwinV2) -> list[ContinuousBias]:
    return [module for module in model.modules() if isinstance(module, ContinuousBias)]


def released(dim: int, depths: tuple[int, ...], mlp: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published file with a 1000-way classifier, without its buffers (vision.md, Appendix A)."""

    def both(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    keys = both("patch_embed.proj", dim, 3, 4, 4) | both("patch_embed.norm", dim)
    for s, depth in enumerate(depths):
        w = dim * 2**s
        for i in range(depth):
            name = f"layers.{s}.blocks.{i}"
            keys |= both(f"{name}.norm1", w) | both(f"{name}.norm2", w) | both(f"{name}.attn.proj", w, w)
            keys |= {f"{name}.attn.qkv.weight": (3 * w, w), f"{name}.attn.logit_scale": (w // 32, 1, 1)}
            keys |= {f"{name}.attn.{which}_bias": (w,) for which in "qv"} | both(f"{name}.attn.{mlp}.0", 512, 2)
            keys |= {f"{name}.attn.{mlp}.2.weight": (w // 32, 512)}
            keys |= both(f"{name}.mlp.fc1", 4 * w, w) | both(f"{name}.mlp.fc2", w, 4 * w)
        if s < len(depths) - 1:
            keys |= both(f"layers.{s}.downsample.norm", 2 * w)
            keys |= {f"layers.{s}.downsample.reduction.weight": (2 * w, 4 * w)}
    return keys | both("norm", 8 * dim) | both("head", 1000, 8 * dim)


@pytest.mark.parametrize(
    ("preset", "total"),
    [
        ("swinv2_tiny_window8_256", 28_347_154),
        ("swinv2_tiny_window16_256", 28_347_154),
        ("swinv2_small_window16_256", 49_728_418),
        ("swinv2_base_window8_256", 87_918_816),
        ("swinv2_base_window12to24_192to384", 87_918_816),
        ("swinv2_large_window12to16_192to256", 196_739_932),
        ("swinv2_huge_window12_192", 655_210_922 + 2_817_000),
        ("swinv2_giant_window12_192", 1_060_976_996 + 3_585_000),
        ("swinv2_gigantic_window12_192", 3_001_912_008),
    ],
)
def test_presets_have_the_published_sizes_names_and_shapes(preset: str, total: int) -> None:
    config = PRESETS[preset]
    model = on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == total
    for layout, mlp in (("official", "cpb_mlp"), ("official_rpe", "rpe_mlp")):
        theirs = {key: tuple(x.shape) for key, x in to_theirs(model.state_dict(), LAYOUTS[layout]).items()}
        assert theirs == released(config.dim, config.depths, mlp)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_is_lossless_and_drops_buffers(layout: str) -> None:
    model, weights = toy(depths=(2, 2, 2)), LAYOUTS[layout]
    theirs = to_theirs(model.state_dict(), weights)
    place = "swinv2.encoder.layers.0.blocks.1.attention.self" if layout == "transformers" else "layers.0.blocks.1.attn"
    buffers = {f"{place}.{name}": torch.zeros(1) for name in ("relative_position_index", "relative_coords_table")}
    back = to_ours(theirs | buffers, weights, model.state_dict())
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    merged = {"timm": "layers.2", "transformers": "swinv2.encoder.layers.1"}.get(layout, "layers.1")
    assert torch.equal(
        theirs[f"{merged}.downsample.reduction.weight"], model.encoder.stages[1].merge.project.branch.weight
    )


def test_every_block_is_the_identity_at_first() -> None:
    model = SwinV2(TOY)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    model.init_weights()
    seen = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda own, args, out: seen.append(torch.equal(args[0], out)))
    assert model.classify(draw(2, 3, 50, 37)).isfinite().all()
    assert seen == [True] * 4
    for name, x in model.named_parameters():
        assert x.isfinite().all(), name
        norm = "blocks" not in name and "norm.weight" in name
        if name.endswith("logit_scale"):
            assert torch.allclose(x, torch.tensor(10.0).log())
        elif "embed." not in name and x.ndim == 1:
            assert (x == float(norm)).all(), name


def test_it_learns_from_there() -> None:
    torch.manual_seed(0)
    model = SwinV2(TOY)
    model.init_weights()
    model.classify(draw(2, 3, 32, 32)).square().sum().backward()
    norms = [block.attention.norm for block in model.encoder.blocks] + [
        block.ffn.norm for block in model.encoder.blocks
    ]
    assert all(norm.weight.grad.any() for norm in norms), "nothing would ever leave the identity"


def test_activations_do_not_grow_with_depth() -> None:
    """Res-post-norm: every branch adds values of its norm's size, whatever comes in."""
    model = toy(depths=(12, 2))
    x = model.encoder.tokens(model.pixels(draw(2, 3, 32, 32))) * 100
    plain, shifted = model.encoder.layouts(model.encoder.stages[0], x)
    for i, block in enumerate(model.encoder.stages[0].blocks):
        after = block(x, None, shifted if i % 2 else plain)
        assert (after - x).std() < 3
        x = after


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (16, 64), (5, 3)])
def test_pictures_of_any_size_are_read(size: tuple[int, int]) -> None:
    model = toy()
    image = draw(3, 3, *size)
    rows, columns = model.encoder.grids(size)[-1]
    together = model.encode(image=image).values.view(3, rows * columns, 32)
    for i in range(3):
        alone = model.encode(image=image[i : i + 1]).values
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-5)
    assert [x.shape[2:] for x in model.features(image)] == model.encoder.grids(size)


def test_a_larger_window_keeps_every_weight_and_every_shared_bias() -> None:
    model = toy()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    small = [bias().detach() for bias in biases(model)]
    model.set_image_size(64, window=8)
    assert model.config.pretrained_window == (4, 4)
    assert [(bias.window, bias.trained) for bias in biases(model)] == [(8, 4)] * 4
    for bias, own in zip(biases(model), small, strict=True):
        large = bias().view(-1, 8, 8, 8, 8)
        shared = large[:, 2:6, 2:6, 2:6, 2:6].reshape(own.shape)
        torch.testing.assert_close(shared, own, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    image = draw(2, 3, 64, 64)
    fresh = SwinV2(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.classify(image), model.classify(image))
    model.set_image_size((128, 96), window=16)
    assert model.config.pretrained_window == (4, 4), "still the windows of the training"
    assert [stage.window for stage in model.encoder.stages] == [16, 12]


def test_the_released_transfer_has_its_windows() -> None:
    model = on_meta(PRESETS["swinv2_base_window12_192"])
    assert [stage.window for stage in model.encoder.stages] == [12, 12, 12, 6]
    model.set_image_size(256, window=16)
    to = PRESETS["swinv2_base_window12to16_192to256"]
    assert (model.config.window, model.config.pretrained_window) == (to.window, to.pretrained_window)
    pairs = [[(bias.window, bias.trained) for bias in biases(own)] for own in (model, on_meta(to))]
    assert pairs[0] == pairs[1]
    assert pairs[0][0] == (16, 12) and pairs[0][-1] == (8, 6)


def test_windows_of_one_place_are_read() -> None:
    model = toy(image_px=4)
    assert [stage.window for stage in model.encoder.stages] == [1, 1]
    assert model.classify(draw(2, 3, 4, 4)).isfinite().all()


def test_layers_and_decay_are_those_of_the_recipes() -> None:
    model = on_meta(PRESETS["swinv2_tiny_window8_256"])
    layers = {
        "encoder.embed.weight": 0,
        "encoder.stages.1.blocks.1.ffn.branch.fc1.weight": 4,
        "encoder.stages.1.merge.project.branch.weight": 4,
        "encoder.stages.3.blocks.1.attention.branch.bias.fc1.weight": 12,
        "encoder.norm.weight": 13,
    }
    assert {name: model.layer_of(name) for name in layers} == layers
    kept = {name for name, p in model.named_parameters() if p.ndim > 1 and model.no_decay(name)}
    wanted = ("bias.fc1.weight", "bias.fc2.weight", "logit_scale")
    assert kept == {name for name, _ in model.named_parameters() if name.endswith(wanted)}


def test_half_precision_is_near_full() -> None:
    model = toy()
    image = draw(4, 3, 45, 64)
    full = model.encode(image=image).values
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode(image=image).values
    assert (half.float() - full).norm() < 0.03 * full.norm()


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="pretrained_window"):
        dataclasses.replace(TOY, pretrained_window=(8, 8, 8))
    with pytest.raises(ConfigError, match="divisible by heads"):
        SwinV2(dataclasses.replace(TOY, heads=3))
