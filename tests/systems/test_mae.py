"""MAE against its paper: what the encoder reads, what is predicted where, sizes, other pictures, start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway import pretrained
from multiway.data.hide import hide_patches
from multiway.engine.optim import build_optimizers
from multiway.errors import ConfigError
from multiway.nn.patch import unpatchify
from multiway.nn.pixels import HALF
from multiway.nn.position import sincos_positions
from multiway.run import Optim
from multiway.systems.mae import LAYOUTS, MAE, PRESETS, Config, MaskedAutoencoding
from multiway.types import Batch
from multiway.weights.rename import to_theirs
from tests.contracts.toys import randomize

TOY = Config(
    dim=32, depth=3, heads=4, hidden=64, patch=8, image_px=(32, 48), decoder_dim=16, decoder_depth=2, decoder_heads=2
)


def toy(**changes: object) -> MAE:
    model = MAE(dataclasses.replace(TOY, **changes))
    randomize(model)
    return model.eval()


def drawn(ratio: float = 0.75, count: int = 3, height: int = 32, width: int = 48) -> Batch:
    rng = np.random.default_rng(0)
    grid = height // 8, width // 8
    hide = np.stack([hide_patches(grid, ratio, rng) for _ in range(count)])
    image = rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    keep = np.flatnonzero(~hide).reshape(count, -1) % hide.shape[1]
    return {
        "image": torch.from_numpy(image),
        "image_hide": torch.from_numpy(hide),
        "image_keep": torch.from_numpy(keep),
        "image_hidden": torch.from_numpy(np.flatnonzero(hide)),
    }


def predicted(model: MAE, batch: Batch) -> Tensor:
    return model.predict(batch["image"], batch["image_keep"], batch["image_hidden"])


@pytest.mark.parametrize(
    ("preset", "encoder", "total"),
    [  # vision.md 4.1; fixed positions count, because files have them
        ("base_patch16", 85_798_656, 111.9),
        ("large_patch16", 303_301_632, 329.5),
        ("huge_patch14", 630_764_800, 657.1),
    ],
)
def test_sizes_are_the_published_ones(preset: str, encoder: int, total: float) -> None:
    with torch.device("meta"):
        alone, whole = (MAE(PRESETS[f"mae_vit_{preset}_224{part}"]).state_dict() for part in ("_encoder", ""))
    assert sum(x.numel() for x in alone.values()) == encoder
    assert round(sum(x.numel() for x in whole.values()) / 1e6, 1) == total
    assert to_theirs(alone, LAYOUTS["official"]).keys() < to_theirs(whole, LAYOUTS["official"]).keys()


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 30, "heads": 2}, {"decoder_dim": 18, "decoder_heads": 2}, {"decoder_heads": 3}, {"image_px": 36}],
)
def test_a_shape_that_does_not_fit_together_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="MAE needs widths|whole patches of 8"):
        dataclasses.replace(TOY, **wrong)


def test_pre_training_needs_a_decoder() -> None:
    with pytest.raises(ConfigError, match="needs a decoder"):
        MaskedAutoencoding(toy(decoder_depth=0))


# --- what is read and predicted ---------------------------------------------------------------------------------------


def test_the_encoder_reads_what_is_kept_and_nothing_else() -> None:
    """Other pixels under the hidden patches: the same predictions, to the bit."""
    model, batch = toy(), drawn()
    assert model.encode(image=batch["image"], keep=batch["image_keep"]).values.shape == (3 * (1 + 6), 32)
    hidden = batch["image_hide"].view(3, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, 255 - batch["image"], batch["image"])
    assert torch.equal(predicted(model, batch | {"image": other}), predicted(model, batch))
    seen = torch.where(hidden, batch["image"], 255 - batch["image"])
    assert not torch.allclose(predicted(model, batch | {"image": seen}), predicted(model, batch), atol=0.1)


def test_every_kept_patch_stands_at_its_place() -> None:
    """Read in another order, patches are the same patches."""
    model, batch = toy(), drawn()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = batch | {"image_keep": batch["image_keep"][:, order]}
    torch.testing.assert_close(predicted(model, shuffled), predicted(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.99])
def test_predictions_at_hidden_patches_are_those_of_a_full_decode(ratio: float) -> None:
    model, batch = toy(), drawn(ratio)
    everything = torch.arange(3 * 24)
    full = model.predict(batch["image"], batch["image_keep"], everything)
    assert full.shape == (3 * 24, 3 * 8**2)
    torch.testing.assert_close(predicted(model, batch), full[batch["image_hidden"]])


def test_a_target_that_is_not_normed_is_the_picture() -> None:
    model, batch = toy(normed=False), drawn()
    target = model.targets(batch["image"], torch.arange(3 * 24))
    patches = target.view(3, 24, 8 * 8, 3).transpose(2, 3).flatten(2)  # our order of a patch: channels first
    torch.testing.assert_close(unpatchify(patches, 8, (4, 6)), model.pixels(batch["image"]))


@pytest.mark.parametrize("normed", [True, False])
def test_the_loss_is_the_papers(normed: bool) -> None:
    """vision.md 4.2, written with loops."""
    objective, batch = MaskedAutoencoding(toy(normed=normed)), drawn()
    model = objective.model
    full = model.predict(batch["image"], batch["image_keep"], torch.arange(3 * 24)).view(3, 24, -1)
    pixels, losses = model.pixels(batch["image"]), []
    for i in range(3):
        for place in range(24):
            if not batch["image_hide"][i, place]:
                continue
            top, left = 8 * (place // 6), 8 * (place % 6)
            patch = pixels[i, :, top : top + 8, left : left + 8].permute(1, 2, 0).flatten()  # channels last
            if normed:
                patch = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6) ** 0.5
            losses.append(((full[i, place] - patch) ** 2).mean())
    counts = objective.counts(batch)
    assert counts == {"image": len(losses)} == {"image": 3 * 18}
    output = objective(batch, counts)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.sums["image"], torch.stack(losses).sum(), rtol=1e-5, atol=0)


def test_a_flat_patch_is_a_finite_target() -> None:
    objective, batch = MaskedAutoencoding(toy(mean=HALF, std=HALF)), drawn()
    batch["image"].fill_(200)
    assert objective.model.targets(batch["image"], batch["image_hidden"]).abs().max() < 1e-3
    assert objective(batch, objective.counts(batch)).loss.isfinite()


# --- other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, (16, 40)])
@pytest.mark.parametrize("decoder_depth", [2, 0])
def test_other_sizes_are_read_after_one_call_and_saved(size, decoder_depth: int, tmp_path: Path) -> None:
    """Fixed positions are made anew, of encoder and decoder, exactly."""
    model = MAE(dataclasses.replace(TOY, decoder_depth=decoder_depth)).eval()
    model.init_weights()
    height, width = (size, size) if isinstance(size, int) else size
    model.set_image_size(size)
    grid = height // 8, width // 8
    for part in model.placed():
        assert torch.equal(part.positions, sincos_positions(part.positions.shape[1], grid, prefix=1))
    assert {name for name, _ in model.named_buffers()} == {
        "encoder.positions", *(["decoder.positions"] if decoder_depth else [])
    }  # fmt: skip
    batch = drawn(height=height, width=width)
    pretrained.save_pretrained(model, tmp_path)
    again = pretrained.load(tmp_path).model
    assert again.config == model.config and again.config.image_px == size
    with torch.no_grad():
        assert torch.equal(again.encode(image=batch["image"]).values, model.encode(image=batch["image"]).values)
        if decoder_depth:
            assert torch.equal(predicted(again, batch), predicted(model, batch))


# --- start, layers ----------------------------------------------------------------------------------------------------


def test_weights_start_as_the_original() -> None:
    """Linear maps Xavier-uniform, patches as one of them; tokens of deviation .02."""
    model = MAE(Config(dim=256, depth=1, heads=4, hidden=1024, image_px=64, decoder_dim=128, decoder_depth=1))
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor, float("nan"))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("_token"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
        elif "norm.weight" in name:
            assert (parameter == 1).all()
        elif parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            matrix = parameter.flatten(1)
            most = (6 / sum(matrix.shape)) ** 0.5
            assert matrix.abs().max().item() == pytest.approx(most, rel=0.01), name
            assert matrix.std().item() == pytest.approx(most / 3**0.5, rel=0.02), name
    assert torch.equal(model.decoder.positions, sincos_positions(128, (4, 4), prefix=1))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.embed.bias", 0),
        ("encoder.cls_token", 0),
        ("encoder.blocks.1.ffn.fc1.weight", 2),
        ("norm.bias", 4),
        ("decoder.embed.weight", 4),
        ("decoder.blocks.0.ffn.fc1.weight", 4),
        ("decoder.hide_token", 4),
    ],
)
def test_layers_are_numbered_from_the_patches(name: str, layer: int) -> None:
    model = toy()
    assert name in dict(model.named_parameters())
    assert model.layer_of(name) == layer and model.layers == 3


def test_everything_but_vectors_decays() -> None:
    """vision.md 4.2."""
    model = toy()
    groups = build_optimizers(MaskedAutoencoding(model), Optim())[0].param_groups
    spared = {p for group in groups if not group["weight_decay"] for p in group["params"]}
    assert all((p in spared) == (p.ndim == 1) for p in model.parameters())
