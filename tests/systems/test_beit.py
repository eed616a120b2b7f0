"""BEiT against the paper and the released files: sizes, names, start, objective, and what tuning takes over."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway import pretrained
from multiway.errors import ConfigError
from multiway.nn.frozen import Frozen
from multiway.nn.quantize import PatchCodebook
from multiway.recipes.pictures import start_from
from multiway.systems import simmim
from multiway.systems.beit import LAYOUTS, PRESETS, BEiT, Config, MaskedImageModeling
from multiway.types import Batch
from multiway.weights.rename import to_ours, to_theirs
from tests.contracts.toys import randomize

SHAPE = {"dim": 32, "depth": 3, "heads": 4, "hidden": 64, "patch": 8, "image_px": 32}
MIM = Config(**SHAPE, bias="shared", codes=19)
TUNED = Config(**SHAPE, classes=7)


def on_meta(config: Config) -> BEiT:
    with torch.device("meta"):
        return BEiT(config)


def initialised(config: Config) -> BEiT:
    torch.manual_seed(0)
    model = BEiT(config)
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


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("beit_base_patch16_224_pt22k", 91_965_776),
        ("beit_large_patch16_224_pt22k", 311_534_016),
        ("beit_base_patch16_224", 86_530_984),
        ("beit_large_patch16_224", 304_430_568),
        ("beit_base_patch16_384", 86_744_104),
        ("beit_large_patch16_384", 304_998_888),
        ("beit_large_patch16_512", 305_674_728),
        ("beit_base_patch16_224_ft22k", 102_557_713),
        ("beit_large_patch16_224_ft22k", 325_792_593),
        ("beit2_base_patch16_224", 86_530_984),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name: str, total: int) -> None:
    assert sum(p.numel() for p in on_meta(PRESETS[name]).parameters()) == total


def released(dim: int = 768) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the pre-trained base model (masked.md 2.4)."""
    vector, matrix = (dim,), (dim, dim)
    keys: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "mask_token": (1, 1, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": vector,
        "rel_pos_bias.relative_position_bias_table": (732, 12),
        "rel_pos_bias.relative_position_index": (197, 197),
        "norm.weight": vector,
        "norm.bias": vector,
        "lm_head.weight": (8192, dim),
        "lm_head.bias": (8192,),
    }
    for i in range(12):
        own = dict.fromkeys(("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.proj.bias"), vector)
        own |= {f"{norm}.{part}": vector for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        own |= {"attn.qkv.weight": (3 * dim, dim), "attn.proj.weight": matrix}
        own |= {"mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,)}
        own |= {"mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": vector}
        keys |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    return keys


def test_the_released_file_is_read_whole_and_written_again() -> None:
    theirs = {name: torch.empty(shape, device="meta") for name, shape in released().items()}
    assert len(theirs) == 190
    like = on_meta(PRESETS["beit_base_patch16_224_pt22k"]).state_dict()
    ours = to_ours(theirs, LAYOUTS["official"], like)
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in like.items()}
    back = to_theirs(ours, LAYOUTS["official"])
    assert theirs.keys() - back.keys() == {"rel_pos_bias.relative_position_index"}


def test_the_variant_of_imagenet_1k_has_positions_and_neither_biases_nor_factors() -> None:
    names = to_theirs(on_meta(PRESETS["beit_base_patch16_224_pt1k_800ep"]).state_dict(), LAYOUTS["official"])
    assert names["pos_embed"].shape == (1, 197, 768)
    assert not [name for name in names if "relative" in name or "gamma" in name]


def test_first_weights_of_pre_training_are_cut_at_one_deviation_and_rescaled() -> None:
    model = initialised(dataclasses.replace(MIM, dim=128, hidden=256, positions="learned"))
    for layer, block in enumerate(model.encoder.blocks, 1):
        for weight, scale in (
            (block.attention.qkv.linear.weight, 1.0),
            (block.attention.out.weight, math.sqrt(2 * layer)),
            (block.ffn.fc2.weight, math.sqrt(2 * layer)),
        ):
            assert weight.abs().max() * scale <= 0.02 + 1e-6
            assert weight.std().item() * scale == pytest.approx(0.0108, rel=0.03)
        assert (block.gamma_1 == 0.1).all() and not block.attention.qkv.linear.bias.any()
    encoder = model.encoder
    for weight in (encoder.embed.weight, encoder.positions, model.mim_head.weight):
        assert weight.abs().max() <= 0.02 and weight.std().item() == pytest.approx(0.0108, rel=0.03)
    for token in (encoder.cls_token, encoder.hide_token):
        assert token.abs().max() <= 0.02 and token.std() > 0.008
    assert not encoder.bias.table.any() and not encoder.embed.bias.any()


def test_first_weights_of_tuning_are_not_cut_and_the_classifier_is_almost_zero() -> None:
    model = initialised(dataclasses.replace(TUNED, dim=128, hidden=256, classes=100))
    for layer, block in enumerate(model.encoder.blocks, 1):
        weight = block.ffn.fc2.weight * math.sqrt(2 * layer)
        assert weight.std().item() == pytest.approx(0.02, rel=0.03) and weight.abs().max() > 0.06
        assert not block.attention.bias.table.any()
    limit = (3 * 8 * 8) ** -0.5  # torch's convolutions: uniform
    assert 0.99 * limit < model.encoder.embed.weight.abs().max() <= limit
    assert model.encoder.embed.bias.any()
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05) and not model.head.bias.any()


def test_the_loss_is_the_mean_cross_entropy_of_hidden_patches() -> None:
    objective, given = MaskedImageModeling(randomize(BEiT(MIM)), None), batch()
    counts = objective.counts(given)
    assert counts == {"image": int(given["image_hide"].sum())}
    out = objective(given, counts)

    model, hide = objective.model, given["image_hide"]
    x = model.encoder.embed(given["image"].float() / 127.5 - 1)
    x = torch.where(hide[..., None], model.encoder.hide_token, x)
    x = torch.cat([model.encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    logits = model.mim_head(model.norm(model.encoder.run(x)[:, 1:]))[hide]
    target = given["image_code"][hide]
    assert out.loss.item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert out.sums["image"].item() == pytest.approx(out.loss.item() * counts["image"], rel=1e-5)
    assert out.sums["image/accuracy"] == (logits.argmax(-1) == target).sum()


def test_pixels_of_hidden_patches_do_not_leak() -> None:
    objective, given = MaskedImageModeling(randomize(BEiT(MIM)), None), batch()
    counts = objective.counts(given)
    noise = torch.randint(0, 256, given["image"].shape, generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    cells = F.interpolate(given["image_hide"].view(-1, 1, 4, 4).float(), scale_factor=8) > 0
    other = {**given, "image": torch.where(cells, noise, given["image"])}
    assert objective(other, counts).loss == objective(given, counts).loss
    seen = {**given, "image": torch.where(cells, given["image"], noise)}
    assert objective(seen, counts).loss != objective(given, counts).loss


class Network(nn.Module):
    """A tokenizer with weights."""

    codes = 19

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(16.0))

    def forward(self, image: Tensor) -> Tensor:
        return (self.weight + image.float().mean((1, 2, 3))[:, None]).long() % 19


def test_a_batch_without_codes_asks_the_tokenizer() -> None:
    given = batch()
    stored = given.pop("image_code")
    model = randomize(BEiT(MIM))
    with pytest.raises(ConfigError, match="needs an image tokenizer, or codes stored"):
        MaskedImageModeling(model, None)(given, {"image": 1})
    book = PatchCodebook(19, 8)
    book.centroids.uniform_(generator=torch.Generator().manual_seed(0))
    for tokenizer, codes in ((book, book(given["image"])), (Frozen(Network()), Network()(given["image"]))):
        asked = MaskedImageModeling(model, tokenizer)(given, {"image": 1}).loss
        assert asked == MaskedImageModeling(model, None)({**given, "image_code": codes}, {"image": 1}).loss
        assert asked != MaskedImageModeling(model, None)({**given, "image_code": stored}, {"image": 1}).loss


def test_a_frozen_tokenizer_is_no_part_of_the_objective() -> None:
    network = Network()
    objective = MaskedImageModeling(BEiT(MIM), Frozen(network))
    assert objective.tokenizer.codes == 19
    assert not [name for name in objective.state_dict() if "tokenizer" in name]
    assert all(parameter is not network.weight for parameter in objective.parameters())
    objective.train()
    objective.to(torch.float64)
    assert network.weight.dtype == torch.float64 and not network.weight.requires_grad and not network.training


def test_codes_and_classes_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="19 codes or 7 classes, not both"):
        dataclasses.replace(MIM, classes=7)
    with pytest.raises(ConfigError, match="set model.codes"):
        MaskedImageModeling(BEiT(TUNED), None)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_classifier_reads_the_normed_mean_or_the_class_token(pool: str) -> None:
    model = randomize(BEiT(dataclasses.replace(TUNED, pool=pool)))
    image = batch()["image"]
    x = model.encoder(image.float() / 127.5 - 1)
    want = model.fc_norm(x[:, 1:].mean(1)) if pool == "mean" else model.norm(x)[:, 0]
    torch.testing.assert_close(model.classify(image), model.head(want))


@pytest.mark.parametrize("image_px", [48, (32, 64)], ids=str)
@pytest.mark.parametrize("config", [MIM, TUNED], ids=["shared", "layer"])
def test_other_image_sizes_keep_biases_between_the_same_offsets(config: Config, image_px) -> None:
    model = randomize(BEiT(config))
    tables = [m.table.detach().clone() for m in model.modules() if hasattr(m, "table")]
    model.set_image_size(image_px)
    height, width = (image_px, image_px) if isinstance(image_px, int) else image_px
    resized = [m.table for m in model.modules() if hasattr(m, "table")]
    assert len(resized) == len(tables) == (1 if config.codes else 3)
    rows, columns = 2 * (height // 8) - 1, 2 * (width // 8) - 1
    for old, new in zip(tables, resized, strict=True):
        assert torch.equal(new[-3:], old[-3:]) and new.shape == (rows * columns + 3, 4)
        grid, was = new[:-3].view(rows, columns, 4), old[:-3].view(7, 7, 4)
        torch.testing.assert_close(grid[rows // 2, columns // 2], was[3, 3])  # no offset at all
    assert model.encode(image=torch.zeros(2, 3, height, width, dtype=torch.uint8)).values.isfinite().all()
    assert model.config.image_px == image_px


def start(source: nn.Module, folder: Path, config: Config) -> BEiT:
    """A new model that starts from one that was pre-trained."""
    pretrained.save_pretrained(source, folder)
    model = initialised(config)
    start_from(model, str(folder))
    return model


def test_tuning_takes_over_the_encoder_with_a_bias_of_its_own_for_every_layer(tmp_path: Path) -> None:
    source = randomize(BEiT(MIM))
    model = start(source, tmp_path, TUNED)
    tables = [block.attention.bias.table for block in model.encoder.blocks]
    assert all(torch.equal(table, source.encoder.bias.table) for table in tables)
    assert len({table.data_ptr() for table in tables}) == 3, "layers share memory"
    image = batch()["image"]
    torch.testing.assert_close(model.encode(image=image).values, source.encoder(source.pixels(image)).flatten(0, 1))
    assert (model.fc_norm.weight == 1).all() and model.head.weight.abs().max() < 1e-4


def test_tuning_with_the_class_token_takes_over_the_norm(tmp_path: Path) -> None:
    source = randomize(BEiT(MIM))
    model = start(source, tmp_path, dataclasses.replace(TUNED, pool="cls"))
    image = batch()["image"]
    torch.testing.assert_close(model.encode(image=image).values, source.encode(image=image).values)


def test_tuning_at_another_size_resizes_positions_and_biases(tmp_path: Path) -> None:
    source = randomize(BEiT(dataclasses.replace(MIM, positions="learned")))
    model = start(source, tmp_path, dataclasses.replace(TUNED, positions="learned", image_px=48))
    source.set_image_size(48)
    assert torch.equal(model.encoder.blocks[2].attention.bias.table, source.encoder.bias.table)
    assert torch.equal(model.encoder.positions, source.encoder.positions)


def test_tuning_takes_over_simmims_vit(tmp_path: Path) -> None:
    source = randomize(simmim.SimMIM(simmim.Config(dim=32, depths=(3,), heads=4, patch=8, image_px=32)))
    model = start(source, tmp_path, dataclasses.replace(TUNED, hidden=128))
    assert torch.equal(model.encoder.blocks[1].ffn.fc1.weight, source.encoder.blocks[1].ffn.fc1.weight)
    assert torch.equal(model.encoder.blocks[1].attention.bias.table, source.encoder.bias.table)


def test_layers_of_learning_rates_are_the_papers() -> None:
    model = on_meta(MIM)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {layers[f"encoder.{name}"] for name in ("cls_token", "hide_token", "embed.weight")} == {0}
    assert layers["encoder.blocks.0.gamma_1"] == 1 and layers["encoder.blocks.2.ffn.fc1.bias"] == 3
    assert {layers[name] for name in ("encoder.bias.table", "norm.weight", "mim_head.weight")} == {4}
    undecayed = {name for name, p in model.named_parameters() if p.ndim > 1 and model.no_decay(name)}
    assert undecayed == {"encoder.cls_token"}


def test_it_learns_one_batch_by_heart() -> None:
    objective, given = MaskedImageModeling(initialised(MIM), None), batch()
    counts = objective.counts(given)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    first = objective(given, counts).loss.item()
    for _ in range(150):
        optimizer.zero_grad()
        out = objective(given, counts)
        out.loss.backward()
        optimizer.step()
    assert first == pytest.approx(math.log(19), rel=0.05)
    assert out.loss.item() < 0.1 and out.sums["image/accuracy"] == counts["image"]
