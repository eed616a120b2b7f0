"""BEiT-2 against the paper and the released code: sizes, names, start, and the two predictions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway import pretrained
from multiway.errors import ConfigError
from multiway.recipes.pictures import start_from
from multiway.systems import beit
from multiway.systems.beit2 import LAYOUTS, PRESETS, BEiT2, Config, PatchAggregation
from multiway.types import Batch
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize

SMALL = Config(
    dim=32, depth=3, heads=4, hidden=64, patch=8, image_px=32, codes=19, early_layer=2, head_layers=2, drop_path=0.0
)  # fmt: skip


def on_meta(config: Config) -> BEiT2:
    with torch.device("meta"):
        return BEiT2(config)


def initialised(config: Config) -> BEiT2:
    torch.manual_seed(0)
    model = BEiT2(config)
    model.init_weights()
    return model


def batch(pictures: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    hide = torch.rand(pictures, 16, generator=generator) < 0.4
    return {
        "image": torch.randint(0, 256, (pictures, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "image_hide": hide,
        "image_hidden": hide.flatten().nonzero()[:, 0],
        "image_code": torch.randint(0, 19, (pictures, 16), generator=generator),
    }


@pytest.mark.parametrize(("size", "total"), [("base", 106_143_056), ("large", 336_728_512)])
def test_presets_have_the_published_numbers_of_parameters(size: str, total: int) -> None:
    model = on_meta(PRESETS[f"beit2_{size}_patch16_224_pt1k"])
    assert sum(p.numel() for p in model.parameters()) == total


def test_official_names_are_beits_and_those_of_the_head() -> None:
    model = on_meta(PRESETS["beit2_base_patch16_224_pt1k"])
    names = to_theirs(model.state_dict(), LAYOUTS["official"])
    with torch.device("meta"):
        plain = beit.BEiT(beit.PRESETS["beit_base_patch16_224_pt22k"]).state_dict()
    head = {name for name in names if name.startswith("cls_pt_layers.")}
    assert names.keys() - head == to_theirs(plain, beit.LAYOUTS["official"]).keys()
    own = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    assert head == {f"cls_pt_layers.{i}.{name}" for i in (0, 1) for name in own}
    given = {**names, "rel_pos_bias.relative_position_index": torch.empty(197, 197, device="meta")}
    assert to_ours(given, LAYOUTS["official"], model.state_dict()).keys() == model.state_dict().keys()


def test_rates_of_stochastic_depth_in_the_head_are_those_of_the_layers_it_follows() -> None:
    for preset, early in (("base", 9), ("large", 21)):
        model = on_meta(PRESETS[f"beit2_{preset}_patch16_224_pt1k"])
        rates = [block.drop_rate for block in model.encoder.blocks]
        assert rates[0] == 0 and rates[-1] == pytest.approx(0.1)
        assert [block.drop_rate for block in model.aggregation] == pytest.approx(rates[early : early + 2])


def predictions(model: BEiT2, given: Batch) -> tuple[Tensor, Tensor]:
    """Scores of all patches after the last block and after the head, block by block."""
    encoder, hide = model.encoder, given["image_hide"]
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (model.config.mean, model.config.std))
    x = torch.where(hide[..., None], encoder.hide_token, encoder.embed((given["image"] / 255 - mean) / std))
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    after = []
    for block in encoder.blocks:
        x = block(x, None, encoder.bias())
        after.append(x)
    head = torch.cat([after[-1][:, :1], after[model.config.early_layer - 1][:, 1:]], dim=1)
    for block in model.aggregation:
        head = block(head, None, encoder.bias())
    return model.mim_head(model.norm(after[-1][:, 1:])), model.mim_head(model.norm(head[:, 1:]))


def test_the_loss_is_the_sum_of_both_cross_entropies_at_hidden_patches() -> None:
    objective, given = PatchAggregation(randomize(BEiT2(SMALL)), None), batch()
    counts = objective.counts(given)
    out = objective(given, counts)
    hide, target = given["image_hide"], given["image_code"][given["image_hide"]]
    last, head = (F.cross_entropy(x[hide], target).item() for x in predictions(objective.model, given))
    assert counts == {"image": len(target)}
    assert abs(last - head) > 0.01
    assert out.loss.item() == pytest.approx(last + head, rel=1e-5)
    assert out.sums["image"].item() == pytest.approx(last * len(target), rel=1e-5)
    assert out.sums["image/aggregation"].item() == pytest.approx(head * len(target), rel=1e-5)
    hits = [(x[hide].argmax(-1) == target).sum() for x in predictions(objective.model, given)]
    assert [out.sums["image/accuracy"], out.sums["image/aggregation_accuracy"]] == hits


def test_pixels_of_hidden_patches_do_not_leak() -> None:
    objective, given = PatchAggregation(randomize(BEiT2(SMALL)), None), batch()
    counts = objective.counts(given)
    cells = F.interpolate(given["image_hide"].view(-1, 1, 4, 4).float(), scale_factor=8) > 0
    other = {**given, "image": torch.where(cells, 255 - given["image"], given["image"])}
    assert objective(other, counts).loss == objective(given, counts).loss


def test_draws_of_the_last_rows_drop_the_heads_branches() -> None:
    model, given = randomize(BEiT2(dataclasses.replace(SMALL, drop_path=0.5))), batch()
    keep = torch.full((2 * model.layers, 4), 0.9)
    before = model(given["image"], given["image_hide"], keep)
    for row in range(2 * SMALL.depth, 2 * model.layers):
        draws = keep.clone()
        draws[row, 2] = 0.01
        last, head = model(given["image"], given["image_hide"], draws)
        changed = [i for i in range(4) if not torch.allclose(before[1][i], head[i], atol=1e-3)]
        assert changed == [2] and torch.equal(last, before[0])


def test_the_head_starts_as_torchs_maps_do_divided_by_its_depth() -> None:
    model = initialised(dataclasses.replace(SMALL, dim=128, hidden=256))
    for layer, block in enumerate(model.aggregation, SMALL.early_layer + 1):
        qkv, out, fc1, fc2 = block.attention.qkv.linear, block.attention.out, block.ffn.fc1, block.ffn.fc2
        scale = math.sqrt(2 * layer)
        for weight, width, factor in (
            (qkv.weight, 128, 1.0), (out.weight, 128, scale), (fc1.weight, 128, 1.0), (fc2.weight, 256, scale),
        ):  # fmt: skip
            limit = width**-0.5 / factor
            assert 0.99 * limit < weight.abs().max() <= limit * 1.0001
        assert not qkv.bias.any() and fc1.bias.any() and (block.gamma_1 == 0.1).all()
    for layer, block in enumerate(model.encoder.blocks, 1):
        assert block.ffn.fc2.weight.abs().max() * math.sqrt(2 * layer) <= 0.02 + 1e-6
    assert model.mim_head.weight.abs().max() <= 0.02


def test_without_its_head_it_is_a_beit(tmp_path: Path) -> None:
    source = randomize(BEiT2(SMALL))
    pretrained.save_pretrained(source, tmp_path)
    model = beit.BEiT(
        beit.Config(dim=32, depth=3, heads=4, hidden=64, patch=8, image_px=32, mean=SMALL.mean, std=SMALL.std)
    )
    start_from(model, str(tmp_path))
    image = batch()["image"]
    torch.testing.assert_close(source.norm(model.encode(image=image).values), source.encode(image=image).values)
    assert torch.equal(source.pool(source.encode(image=image)), source.encode(image=image).prefix("image"))


def test_an_early_layer_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="a block before the last, 1 to 2, got 3"):
        dataclasses.replace(SMALL, early_layer=3)


def test_other_image_sizes_resize_the_bias() -> None:
    model = randomize(BEiT2(SMALL))
    model.set_image_size((32, 48))
    assert model.encode(image=torch.zeros(2, 3, 32, 48, dtype=torch.uint8)).values.shape == (2 * 25, 32)
    assert model.encoder.bias.table.shape == (7 * 11 + 3, 4)


def test_it_learns_one_batch_by_heart() -> None:
    objective, given = PatchAggregation(initialised(SMALL), None), batch()
    counts = objective.counts(given)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    first = objective(given, counts).loss.item()
    for _ in range(150):
        optimizer.zero_grad()
        out = objective(given, counts)
        out.loss.backward()
        optimizer.step()
    assert first == pytest.approx(2 * math.log(19), rel=0.05)
    assert out.loss.item() < 0.2 and out.sums["image/aggregation_accuracy"] == counts["image"]
