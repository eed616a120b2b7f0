"""SimMIM against its paper: what is predicted where, which pixels count, sizes, names, start."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway.data.hide import hide_cells
from multiway.errors import ConfigError
from multiway.nn.patch import patchify
from multiway.nn.position import resize_bias_table
from multiway.systems.simmim import LAYOUTS, PRESETS, Config, MaskedImageModeling, SimMIM, relative_to_window
from multiway.types import Batch
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize

VIT = Config(dim=32, depths=(3,), heads=4, patch=8, image_px=32)
RESNET = Config(encoder="resnet", dim=8, depths=(1, 1, 1), patch=4, image_px=48)
SWIN = Config(encoder="swin", dim=16, depths=(2, 2), heads=2, patch=4, window=4, image_px=32)
SWIN_V2 = dataclasses.replace(SWIN, encoder="swin_v2")
KINDS = pytest.mark.parametrize("config", [VIT, SWIN, SWIN_V2, RESNET], ids=lambda config: config.encoder)


def batch(config: Config, count: int = 4, cell: int = 2, seed: int = 0) -> Batch:
    """Random pictures, cells of ``cell`` patches hidden."""
    rng = np.random.default_rng(seed)
    hide = np.stack([hide_cells(config.grid, cell, 0.6, rng) for _ in range(count)])
    image = rng.integers(0, 256, (count, 3, config.image_px, config.image_px), dtype=np.uint8)
    return {
        "image": torch.from_numpy(image),
        "image_hide": torch.from_numpy(hide),
        "image_hidden": torch.from_numpy(np.flatnonzero(hide)),
    }


def objective(config: Config) -> MaskedImageModeling:
    built = MaskedImageModeling(SimMIM(config))
    randomize(built)
    return built


def pixels_of(hide: Tensor, config: Config) -> Tensor:
    """Which pixels are hidden: bool (B, 1, H, W)."""
    patches = hide.view(-1, 1, *config.grid)
    return patches.repeat_interleave(config.patch, 2).repeat_interleave(config.patch, 3)


def loss_of(built: MaskedImageModeling, given: Batch) -> Tensor:
    return built(given, built.counts(given)).loss


@KINDS
@pytest.mark.parametrize("cell", [1, 2])
@pytest.mark.parametrize("window", [0, 9])
def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels(config: Config, cell: int, window: int) -> None:
    """Against the whole picture, also where a cell of the decoder is hidden in part."""
    built, given = objective(dataclasses.replace(config, target_window=window)).eval(), batch(config, cell=cell)
    image = built.model.pixels(given["image"])
    target = relative_to_window(image, window) if window else image
    dense = built.model.reconstruct(given["image"], given["image_hide"])
    inside = pixels_of(given["image_hide"], config)
    want = ((dense - target).abs() * inside).sum() / inside.sum() / 3
    assert built.counts(given) == {"image": int(inside.sum())}
    loss = loss_of(built, given)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    parameters = [p for p in built.parameters() if p.requires_grad]
    for ours, dense_twins in zip(*(torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, want))):
        assert (ours - dense_twins).norm() <= 1e-5 * dense_twins.norm() + 1e-9


@KINDS
def test_predictions_stand_in_the_order_of_a_pixel_shuffle(config: Config) -> None:
    """Their decoder is a 1x1 convolution and PixelShuffle: its weights serve as they are."""
    model, given = objective(config).model.eval(), batch(config)
    cells = model.patches(model.encode(image=given["image"], hide=given["image_hide"]))
    rows = config.image_px // config.stride
    maps = cells.transpose(1, 2).unflatten(2, (rows, rows))
    maps = torch.nn.functional.conv2d(maps, model.decoder.weight[..., None, None], model.decoder.bias)
    want = torch.nn.functional.pixel_shuffle(maps, config.stride)
    torch.testing.assert_close(model.reconstruct(given["image"], given["image_hide"]), want, rtol=1e-5, atol=1e-5)


@KINDS
def test_visible_pixels_are_no_target_and_hidden_ones_are_not_read(config: Config) -> None:
    built, given = objective(config), batch(config)
    other = batch(config, seed=1)["image"]
    inside = pixels_of(given["image_hide"], config)

    def found(image: Tensor) -> Tensor:
        return built.model.predict(image, given["image_hide"], given["image_hidden"])

    visible = torch.where(inside, given["image"], other)
    targets = [built.model.targets(image, given["image_hidden"]) for image in (given["image"], visible)]
    assert torch.equal(*targets), "a visible pixel is predicted"
    assert not torch.allclose(found(visible), found(given["image"]), atol=1e-2), "visible pixels are not read"
    assert torch.equal(found(torch.where(inside, other, given["image"])), found(given["image"])), "a hidden one is"


def test_the_published_mask_hides_a_whole_number_of_cells_from_above() -> None:
    for preset, cell, count in (("vit_base_patch16_224", 2, 30), ("swin_base_window6_192", 8, 22)):
        config = PRESETS[f"simmim_{preset}"]
        hide = hide_cells(config.grid, cell, 0.6, np.random.default_rng(0))
        assert hide.sum() == count * cell**2 and count == math.ceil(len(hide) / cell**2 * 0.6)


@pytest.mark.parametrize(("window", "size"), [(47, (60, 53)), (5, (8, 11)), (47, (20, 20))])
def test_targets_in_a_window_equal_a_naive_loop(window: int, size: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).mul_(2).add_(0.7)
    got = relative_to_window(image, window)
    half = window // 2
    for y in range(0, size[0], 3):
        for x in range(size[1]):
            around = image[0, :, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1].flatten(1)
            want = (image[0, :, y, x] - around.mean(1)) / (around.var(1) + 1e-6).sqrt()
            torch.testing.assert_close(got[0, :, y, x], want, rtol=1e-4, atol=1e-4)


def test_a_flat_picture_is_a_finite_target() -> None:
    assert relative_to_window(torch.full((1, 3, 32, 32), 1.7), 47).abs().max() < 0.5


@pytest.mark.parametrize(
    ("preset", "total"),
    [
        # Blocks as BEiT-B's; patches, two tokens, relative bias and norm; the linear map to 16 x 16 x 3 pixels.
        ("vit_base_patch16_224", 12 * 7_088_640 + 768 * 769 + 2 * 768 + 732 * 12 + 2 * 768 + 768 * 769),
        # Of vision.md 5.1 and 6.1 without their 1000 classes, with a token and 32 x 32 x 3 pixels; smaller tables.
        ("swin_base_window6_192", 87_768_224 - 1000 * 1025 + 128 + 3072 * 1025 - (13**2 - 11**2) * (8 + 16 + 288 + 64)),
        ("swinv2_base_window12_192", 87_918_816 - 1000 * 1025 + 128 + 3072 * 1025),
        ("swinv2_huge_window12_192", 655_210_922 + 352 + 3072 * 2817),
        ("swinv2_giant_window12_192", 1_060_976_996 + 448 + 3072 * 3585),
        ("resnet50_192", 23_508_032 + 64 + 3072 * 2049),
    ],
)
def test_parameters(preset: str, total: int) -> None:
    with torch.device("meta"):
        model = SimMIM(PRESETS[f"simmim_{preset}"])
    assert sum(p.numel() for p in model.parameters()) == total


def test_the_official_vit_has_its_keys_and_shapes() -> None:
    """Appendix A of the specification."""
    with torch.device("meta"):
        state = to_theirs(SimMIM(PRESETS["simmim_vit_base_patch16_224"]).state_dict(), LAYOUTS["official"])
    vector, shapes = (768,), {key: tuple(value.shape) for key, value in state.items()}
    block = {"gamma_1": vector, "gamma_2": vector, "attn.q_bias": vector, "attn.v_bias": vector}
    block |= {"attn.qkv.weight": (2304, 768), "attn.proj.weight": (768, 768), "attn.proj.bias": vector}
    block |= {"mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072)}
    block |= {"mlp.fc2.bias": vector} | {f"norm{n}.{part}": vector for n in (1, 2) for part in ("weight", "bias")}
    want = {
        "encoder.cls_token": (1, 1, 768),
        "encoder.mask_token": (1, 1, 768),
        "encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "encoder.patch_embed.proj.bias": vector,
        "encoder.rel_pos_bias.relative_position_bias_table": (732, 12),
        "encoder.norm.weight": vector,
        "encoder.norm.bias": vector,
        "decoder.0.weight": (768, 768, 1, 1),
        "decoder.0.bias": vector,
        **{f"encoder.blocks.{i}.{key}": shape for i in range(12) for key, shape in block.items()},
    }
    assert shapes == want
    assert LAYOUTS["official"].drops("encoder.rel_pos_bias.relative_position_index")


def test_a_supervised_resnet50_has_torchvisions_keys() -> None:
    config = dataclasses.replace(PRESETS["simmim_resnet50_192"], masked=False, classes=1000)
    with torch.device("meta"):
        ours = SimMIM(config).state_dict()
    theirs = to_theirs(ours, LAYOUTS["torchvision"])
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    want = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in norm)}
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for i in range(depth):
            at = f"layer{stage}.{i}"
            want |= {f"{at}.conv{n}.weight" for n in (1, 2, 3)}
            want |= {f"{at}.bn{n}.{part}" for n in (1, 2, 3) for part in norm}
        want |= {f"layer{stage}.0.downsample.0.weight", *(f"layer{stage}.0.downsample.1.{part}" for part in norm)}
    assert theirs.keys() == want
    assert theirs["layer3.0.conv2.weight"].shape == (256, 256, 3, 3)
    assert list(to_ours(theirs, LAYOUTS["torchvision"], ours)) == list(ours)


def test_a_vit_starts_as_beits() -> None:
    model = SimMIM(dataclasses.replace(VIT, dim=64))
    torch.manual_seed(0)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma_1", "gamma_2")):
            assert (parameter == 0.1).all()
        elif name.startswith("decoder."):
            assert parameter.abs().max() <= 1 / 8 and parameter.std() > 0.05  # torch's for 64 inputs
        elif "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all()
        elif "bias" in name:
            assert not parameter.any(), name
        else:
            rescaled = name.endswith(("out.weight", "fc2.weight"))
            scale = math.sqrt(2 * (int(name.split(".")[2]) + 1)) if rescaled else 1
            assert parameter.abs().max() <= 0.02 / scale * 1.0001, name
            assert parameter.std().item() == pytest.approx(0.5396 * 0.02 / scale, rel=0.3), name


def test_layers_and_decay() -> None:
    model = SimMIM(VIT)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["encoder.hide_token"] == layers["encoder.embed.weight"] == layers["encoder.cls_token"] == 0
    assert layers["encoder.blocks.2.ffn.fc1.weight"] == 3
    assert layers["encoder.bias.table"] == layers["decoder.weight"] == layers["norm.weight"] == 4
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert {name for name in matrices if model.no_decay(name)} == {"encoder.hide_token", "encoder.cls_token"}
    for config, expected in (
        (RESNET, {"embed.0.weight": 0, "hide_token": 0, "blocks.1.conv2.1.weight": 2}),
        (
            SWIN,
            {"embed_norm.weight": 0, "stages.0.merge.project.linear.weight": 2, "stages.1.blocks.0.ffn.fc1.bias": 3},
        ),
    ):
        model = SimMIM(config)
        for name, layer in expected.items():
            assert name in dict(model.encoder.named_parameters()) and model.layer_of(f"encoder.{name}") == layer
        assert model.layers == model.config.depth and model.layer_of("decoder.bias") == model.layers + 1
    tables = [name for name, p in SimMIM(SWIN).named_parameters() if p.ndim > 1 and SimMIM(SWIN).no_decay(name)]
    assert len(tables) == 4 + 1 and "encoder.stages.1.blocks.1.attention.bias.table" in tables


@KINDS
def test_other_sizes_are_read_and_predicted(config: Config) -> None:
    built = objective(config)
    built.model.set_image_size(96)
    given = batch(built.model.config)
    assert given["image_hide"].shape[1] == (96 // config.patch) ** 2
    assert loss_of(built, given).isfinite()
    features = built.model.encode(image=given["image"]).dense("image")[0]
    assert features.shape[1] == built.model.prefix + (96 // config.stride) ** 2
    assert built.model.pool(built.model.encode(image=given["image"])).shape == (4, built.model.encoder.width)
    same = SimMIM(built.model.config)
    same.load_state_dict(built.model.state_dict())
    assert torch.equal(
        same.eval().encode(image=given["image"]).values, built.eval().model.encode(image=given["image"]).values
    )
    with pytest.raises(ConfigError, match="whole patches"):
        built.model.set_image_size(100)


def test_biases_of_a_swin_are_resized_geometrically() -> None:
    """With the pictures, as its fine-tuning code does it; Swin's own does it bicubically."""
    model = objective(SWIN).model
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias.table")}
    model.set_image_size(64, window=8)
    for name, table in model.named_parameters():
        if name in before:
            torch.testing.assert_close(table.data, resize_bias_table(before[name], (4, 4), (8, 8), 0, "geometric"))
    assert model.config.window == 8 and len(before) == 4


def test_only_sums_over_pictures_can_be_split() -> None:
    assert objective(VIT).splittable
    assert not objective(RESNET).splittable


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder": "resnet"}, "patches of 4 pixels"),
        ({"image_px": 36}, "whole patches of 8"),
        ({"target_window": 8}, "odd"),
        ({"encoder": "swin"}, "a window"),
        ({"depths": (1, 1)}, "one stage"),
        ({"heads": 5}, "divisible"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(VIT, **change)


def test_pre_training_needs_what_it_trains() -> None:
    with pytest.raises(ConfigError, match="masked"):
        MaskedImageModeling(SimMIM(dataclasses.replace(VIT, masked=False)))


@KINDS
def test_it_overfits_a_batch(config: Config) -> None:
    """Smooth pictures, so that what is hidden follows from what is not."""
    built = MaskedImageModeling(SimMIM(dataclasses.replace(config, layer_scale=0.0)))
    torch.manual_seed(0)
    built.init_weights()
    given = batch(config, count=4)
    ramp = torch.linspace(0, 255, config.image_px)
    shades = torch.linspace(0.2, 1, 4)[:, None, None, None] * (ramp + ramp[:, None]) / 2
    given["image"] = shades.expand(-1, 3, -1, -1).to(torch.uint8)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(160):
        loss = loss_of(built, given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0], losses[::10]


def test_patches_are_the_models_patches() -> None:
    """Targets are pixels by channel, row and column of the patches `hide` numbers."""
    model, given = SimMIM(RESNET), batch(RESNET)
    pixels = model.pixels(given["image"])
    want = patchify(pixels, 4)[given["image_hide"]]
    assert torch.equal(model.targets(given["image"], given["image_hidden"]), want)
