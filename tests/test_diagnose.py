"""Every diagnosis from the command line to its page, at a size of seconds; and what its figures must be."""

from __future__ import annotations

import dataclasses
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multiway import cli, config, recipes
from multiway.data import prepare
from multiway.data.order import generator
from multiway.diagnose import attention, features, hiding, inputs, reconstruct, scaling
from multiway.diagnose.page import number
from multiway.errors import ConfigError, DataError, MissingInputError
from multiway.nn.window import make_layout
from multiway.plan import make_plan
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained, create_model
from multiway.recipes.pictures import Hiding
from multiway.systems.simmim import relative_to_window
from tests import tiny

SHAPE = {"dim": 32, "depth": 3, "heads": 2, "hidden": 64, "patch": 8, "image_px": 32}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
SIMMIM = {"dim": 32, "depths": (2,), "heads": 2, "patch": 8}
VOID = {"meta", "img", "source"}


def made(name: str, **overrides: object) -> Pretrained:
    """A model with random weights."""
    torch.manual_seed(0)
    model = create_model(name, **overrides).eval()
    return Pretrained(model, None, Preprocessor.of(model.config, None), name)


def saved(folder: Path, name: str, **overrides: object) -> str:
    """The folder of one."""
    made(name, **overrides).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("mae"), "mae_vit_micro_patch4_32", **SHAPE, **DECODER)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vit"), "vit_micro_patch4_32", **SHAPE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_pictures(folder, 9)
    return folder


class Page(HTMLParser):
    """What a page would load, and its ids; fails where a tag is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def diagnosed(capsys, out: Path, *arguments: object) -> dict:
    """Run ``multiway diagnose``; its figures, after a look at the folder it wrote."""
    cli.main(["diagnose", *map(str, arguments), "--out", str(out)])
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads and all(load.startswith("data:image/") for load in page.loads)
    assert len(set(page.ids)) == len(page.ids) and "$" not in text.replace("$body", "")
    drawn = sorted(out.glob("*.png"))
    assert len(page.loads) == 2 * len(drawn) > 0
    for path in drawn:
        with Image.open(path) as image:
            assert image.width > 1400 and len(set(image.convert("L").histogram())) > 2
    return json.loads((out / "figures.json").read_text())


# -------------------------------------------------------------------------------------------------------------- hiding


@pytest.fixture
def few(monkeypatch):
    """Fewer patterns and curves."""
    monkeypatch.setattr(hiding, "CURVE_DRAWS", 4)
    monkeypatch.setattr(hiding, "BLOCKS", (16, 64))
    monkeypatch.setattr(hiding, "SHOWN", 1)


def test_hiding(few, capsys, tmp_path):
    found = diagnosed(capsys, tmp_path, "hiding", "--draws", 60)
    assert found["strategies"]["yours, as SimMIM"]["mean"] == pytest.approx(15.2, abs=3 * 2.6 / 60**0.5 + 0.05)
    assert found["strategies"]["MAE"]["ratio"] == 0.75
    assert found["central square"][0]["mean"] == pytest.approx(10.672, abs=5e-4)
    assert found["cells"]["64 px"][-1] is None  # at 0.9 all nine cells are hidden
    assert found["sweet"] == [15.0, 20.0]
    page = (tmp_path / "report.html").read_text()
    assert "at 192 px; within 15 to 20 px" in page and "assumption" not in page


def test_at_other_resolutions_the_band_is_an_assumption(few, capsys, tmp_path):
    arguments = ("--px", 32, "--patch", 4, "--cell", 8, "--draws", 8)
    found = diagnosed(capsys, tmp_path, "hiding", *arguments)
    assert found["sweet"] == [2.5, pytest.approx(10 / 3)]
    assert found["px"] == 32 and "SimMIM" not in found["strategies"]  # its cells of 32 px do not fit
    assert "assumption" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hiding": Hiding(scheme="cells", cell=32), "px": 200}, "not whole patches of 16"),
        ({"hiding": Hiding(scheme="cells", cell=24)}, "multiple of the patch"),
        ({"hiding": Hiding(scheme="cells", cell=64, ratio=0.95)}, "AvgDist needs both"),
        ({"hiding": Hiding(scheme="cells", cell=256)}, "do not fit into pictures of 192"),
        ({"hiding": Hiding(), "draws": 1}, "at least 2"),
    ],
)
def test_strategies_that_cannot_be(given, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        hiding.run(tmp_path, **{"draws": 4, **given})


# ----------------------------------------------------------------------------------------------------------- attention


def test_attention_of_two_models(mae, vit, pictures, capsys, tmp_path):
    found = diagnosed(capsys, tmp_path, "attention", mae, vit, "--data", pictures, "--count", 5)
    assert found["pictures"] == 5
    layers = found["models"][vit]["layers"]
    assert len(layers) == 3 and all(len(layer["distance"]) == 2 for layer in layers)
    far = np.hypot(*np.indices((4, 4)) * 8.0)
    pairs = [far[abs(a - c), abs(b - d)] for a in range(4) for b in range(4) for c in range(4) for d in range(4)]
    assert layers[0]["uniform_distance"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert layers[0]["uniform_entropy"] == pytest.approx(np.log(16), rel=1e-5)


@torch.inference_mode()
def test_batches_are_streamed_and_blocks_looked_at_in_order(monkeypatch, pictures):
    model = made("vit_micro_patch4_32", **SHAPE)
    for block in model.model.encoder.blocks:
        torch.nn.init.normal_(block.attention.qkv.linear.weight, std=0.5)
    shown = inputs.open_pictures(str(pictures), None, 7)
    monkeypatch.setattr(attention, "BATCH", 3)
    found = attention.measure(model, shown)
    images = next(shown.batches([model]))[0]
    x = model.model.encoder.tokens(model.model.pixels(images))
    for block, layer in zip(model.model.encoder.blocks, found, strict=True):
        maps = block.attention.maps(x)[:, :, 1:, 1:]
        maps = maps / maps.sum(-1, keepdim=True)
        entropy = -(maps * maps.log()).sum(-1).mean((0, 2))
        np.testing.assert_allclose(layer["entropy"], entropy, rtol=1e-4)
        x = block(x)
    assert len(model.model.encoder.blocks[0].attention._forward_pre_hooks) == 0


@pytest.mark.parametrize("shift", [0, 2])
@torch.inference_mode()
def test_tokens_of_windows_lie_where_the_map_has_them(shift):
    """A map of 6x8 in windows of 4: two rows of padding, the shift rolls up and left."""
    [block] = made("swin_micro_patch2_window4_32", dim=8, depths=(1,), heads=2).model.encoder.blocks
    layout = make_layout((6, 8), 4, shift, 2, torch.device("cpu"))
    maps, reach, places, real = attention.of_windows(
        block.attention, torch.randn(3, 6, 8, 8), layout, px=(48, 64), grid=None
    )
    assert maps.shape == (3, 4, 2, 16, 16)
    for window in range(4):
        for token in range(16):
            row = (4 * (window // 2) + token // 4 + shift) % 8
            column = (4 * (window % 2) + token % 4 + shift) % 8
            assert places[window, token].tolist() == [8 * row, 8 * column]
            assert bool(real[window, token]) == (row < 6)
    apart = (places[:, :, None] - places[:, None]).abs().amax(-1)
    assert bool((apart[reach & real[:, :, None] & real[:, None]] < 32).all())  # nobody looks across the edge
    assert float(maps[(~reach)[None, :, None].expand_as(maps)].sum()) < 1e-6


@torch.inference_mode()
def test_maps_of_packed_rows_are_what_attention_does():
    model = tiny.pretrained().model
    own = model.encoder.blocks[0].attention
    plan = make_plan({"image": {"image": [7, 7]}})
    x = torch.randn(14, 32)
    maps, _, places, real = attention.of_packed(own, x, plan, px=(32, 48), grid=(2, 3))
    v = own.qkv(x, plan).view(2, 7, 3, 2, -1)[:, :, 2].transpose(1, 2)
    mixed = (maps[:, 0] @ v).transpose(1, 2).reshape(14, -1)
    torch.testing.assert_close(own.out(mixed, plan), own(x, plan))
    assert real[0].tolist() == [False] + [True] * 6 and places[0, 6].tolist() == [16.0, 32.0]


@pytest.mark.parametrize(
    ("name", "overrides", "layers"),
    [
        ("swin_micro_patch2_window4_32", {"dim": 8, "depths": (2, 2), "heads": 2}, 4),
        ("swinv2_micro_patch2_window4_32", {"dim": 8, "depths": (2, 2), "heads": 2}, 4),
        ("mae_vit_micro_patch4_32", {**SHAPE, **DECODER}, 3),
        ("simmim_vit_micro_patch4_32", SIMMIM, 2),
        ("beit_micro_patch4_32", SHAPE, 3),
        ("beit3_tiny_patch16_64", tiny.SHAPE, 2),
    ],
)
def test_every_encoder_that_attends_is_looked_at(name, overrides, layers, pictures):
    found = attention.measure(made(name, **overrides), inputs.open_pictures(str(pictures), None, 3))
    assert len(found) == layers
    for layer in found:
        assert (layer["distance"] > 0).all() and (layer["entropy"] <= layer["uniform_entropy"] + 1e-5).all()


def test_models_that_cannot_be_looked_at(pictures, tmp_path):
    resnet = made("simmim_resnet50_192", dim=4, depths=(1, 1), image_px=32)
    with pytest.raises(ConfigError, match="SimMIM has no attention to look at"):
        attention.measure(resnet, inputs.open_pictures(str(pictures), None, 2))
    with pytest.raises(ConfigError, match="compares 2 different ones, got vit"):
        attention.run(tmp_path, ["vit_micro_patch4_32"] * 3)
    with pytest.raises(MissingInputError, match="did you mean 'vit_micro_patch4_32'"):
        attention.run(tmp_path, ["vit_micro_patch4_23"])


# ------------------------------------------------------------------------------------------------------------ features


def test_features_of_two_models(mae, capsys, tmp_path):
    found = diagnosed(capsys, tmp_path, "features", mae, "swinv2_micro_patch2_window4_32", "--count", 8)
    other = f"swinv2_micro_patch2_window4_32{inputs.RANDOM}"
    depth = [len(found["models"][name]["std"]) for name in (mae, other)]
    assert depth[0] == 4 and np.shape(found["cka"]) == (sum(depth), sum(depth))
    assert "std at first" in found["models"][mae] and "std at first" not in found["models"][other]
    first = found["models"][other]["std"][1]
    assert first == pytest.approx(found["models"][other]["std"][0])  # blocks of Swin V2 are the identity at first


@torch.inference_mode()
def test_layers_are_what_blocks_return(pictures):
    model = made("vit_micro_patch4_32", **SHAPE)
    shown = inputs.open_pictures(str(pictures), None, 9)
    similar, [std] = features.measure([model], shown)
    [images] = next(shown.batches([model]))
    layers = [model.model.encoder.tokens(model.model.pixels(images))]
    for block in model.model.encoder.blocks:
        layers.append(block(layers[-1]))
    np.testing.assert_allclose(std, [float(x.std(correction=0)) for x in layers], rtol=1e-5)
    np.testing.assert_allclose(np.diag(similar), 1, rtol=1e-9)
    assert similar.shape == (4, 4) and (similar <= 1 + 1e-9).all()
    first = features.at_first(model, shown)
    torch.manual_seed(0)
    model.model.init_weights()
    assert features.measure([model], shown)[1] == [pytest.approx(first)]
    assert std != pytest.approx(first)


@pytest.mark.parametrize(
    ("name", "overrides", "layers"),
    [
        ("simmim_resnet50_192", {"dim": 4, "depths": (1, 1), "image_px": 32}, 3),
        ("beit3_tiny_patch16_64", tiny.SHAPE, 3),
    ],
)
def test_blocks_of_other_kinds_have_features(name, overrides, layers, pictures):
    similar, [std] = features.measure([made(name, **overrides)], inputs.open_pictures(str(pictures), None, 6))
    assert similar.shape == (layers, layers) and len(std) == layers


def test_three_pictures_are_too_few(pictures, tmp_path):
    with pytest.raises(ConfigError, match="has 3 pictures, debiased CKA needs at least 4"):
        features.run(tmp_path, ["vit_micro_patch4_32"], data=str(pictures), count=3)


# --------------------------------------------------------------------------------------------------------- reconstruct


def test_reconstruct_with_a_box(mae, pictures, capsys, tmp_path):
    picture = pictures / "004.png"
    box = ("--data", picture, "--box", "2,14,30,44", "--ratio", 0.5)
    found = diagnosed(capsys, tmp_path, "reconstruct", mae, *box)
    whats = ["single patches, ratio 0.5", "half of the box", "all but a rim of the box", "all of the box"]
    assert [own["what"] for own in found["panels"]] == whats
    assert found["relative"] and found["panels"][0]["ratio"] == 0.5
    assert "taken from the original" in (tmp_path / "report.html").read_text()


def test_reconstruct_several_pictures_as_the_run_hid_them(mae, tmp_path, capsys):
    """A run's folder says how its patches were hidden."""
    run, _ = recipes.recipe("mae.quick")
    run = dataclasses.replace(run, objective=Hiding(scheme="blocks", ratio=0.25))
    saved(tmp_path / "run" / "final", "mae_vit_micro_patch4_32", **SHAPE, **DECODER)
    config.save(run, tmp_path / "run" / "run.json")
    found = diagnosed(capsys, tmp_path / "out", "reconstruct", tmp_path / "run", "--count", 2)
    assert [own["what"] for own in found["panels"]] == ["blocks, ratio 0.25"] * 2
    assert [own["ratio"] for own in found["panels"]] == [0.25] * 2


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mae_vit_micro_patch4_32", {**SHAPE, **DECODER, "normed": True}),
        ("mae_vit_micro_patch4_32", {**SHAPE, **DECODER, "normed": False}),
        ("simmim_vit_micro_patch4_32", SIMMIM),
        ("simmim_vit_micro_patch4_32", {**SIMMIM, "target_window": 7}),
        (
            "simmim_swinv2_small_window12_192",
            {"dim": 8, "depths": (1, 1), "heads": 2, "window": 4, "image_px": 32, "share": 1.0},
        ),
    ],
)
def test_a_model_that_knows_the_answer_restores_the_picture(name, overrides, monkeypatch):
    """Targets instead of predictions: units, order of pixels and statistics must all be undone."""
    model = made(name, **overrides)
    own, shape = model.model, model.model.config
    if hasattr(own, "reconstruct"):
        window = shape.target_window

        def reconstruct_all(image, hide):
            return relative_to_window(own.pixels(image), window) if window else own.pixels(image)

        monkeypatch.setattr(own, "reconstruct", reconstruct_all)
    else:
        monkeypatch.setattr(own, "predict", lambda image, keep, hidden: own.targets(image, hidden))
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8))
    hide = generator(0).random((32 // shape.patch) ** 2) < 0.6
    fill = reconstruct.filler(model)
    panel = reconstruct.panel(model, fill, picture, hide, ("", ""))
    assert np.abs(panel.filled.astype(int) - panel.original).max() <= 1
    assert panel.figures()["error"] < 0.2 < panel.figures()["trivial"]
    assert (panel.original.transpose(2, 0, 1) == picture.numpy()).all()


def test_only_hidden_pixels_are_filled_in(mae):
    model = inputs.open_model(mae)
    picture = torch.full((3, 32, 32), 77, dtype=torch.uint8)
    hide = np.arange(16) == 5
    panel = reconstruct.panel(model, reconstruct.filler(model), picture, hide, ("", ""))
    changed = (panel.filled != 77).any(-1)
    assert panel.hide[8:16, 8:16].all() and panel.hide.sum() == 64
    assert not changed[~panel.hide].any()


def test_the_three_patterns_of_a_box():
    """A box of 34x30 pixels among 64x64, cells of 16, patches of 8."""
    inside = np.zeros((64, 64), bool)
    inside[10:44, 20:50] = True
    found = reconstruct.of_box(inside, Hiding(scheme="cells", cell=16), 8, generator(0))
    half, rim, whole = (own.reshape(8, 8) for own in found.values())
    cells = np.zeros((4, 4), bool)
    cells[0:3, 1:4] = True
    assert (whole == cells.repeat(2, 0).repeat(2, 1)).all()
    assert half.sum() == 4 * 5 and not (half & ~whole).any()  # five of nine cells
    assert rim.sum() == 3 * 3 and rim[2:5, 3:6].all()  # rows 16 to 40 of 10 to 44, columns 24 to 48 of 20 to 50


@pytest.mark.parametrize("share", [None, 1.0, 0.5])
def test_a_box_is_looked_for_where_the_model_sees_it(share):
    """A picture of 40x80: squeezed, its centre, or half of that."""
    model = made("vit_micro_patch4_32", **SHAPE)
    model = dataclasses.replace(model, preprocessor=dataclasses.replace(model.preprocessor, share=share))
    inside = reconstruct.seen(model, torch.zeros(3, 40, 80, dtype=torch.uint8), (30, 10, 50, 30))
    expected = {None: (8, 12, 16, 8), 1.0: (8, 8, 16, 16), 0.5: (0, 0, 32, 32)}[share]
    assert reconstruct.bounds(inside) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        (["4,6,38,60"], "not in the picture of 40x48 pixels"),
        (["9,6,9,20"], "expected x0,y0,x1,y1 with 0 <= x0 < x1 <= 40"),
        (["4,6,12,14"], "too small for a rim"),
        (["0,0,40,48"], "nothing would stay visible"),
        (["4,6,12"], "expected four whole numbers"),
    ],
)
def test_boxes_that_cannot_be(boxes, told, mae, pictures, tmp_path, capsys):
    boxes = [word for box in boxes for word in ("--box", box)]
    picture = ("--data", str(pictures / "000.png"), "--out", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["diagnose", "reconstruct", mae, *picture, *boxes])
    assert told in capsys.readouterr().err


def test_what_cannot_be_reconstructed(mae, vit, pictures, tmp_path):
    with pytest.raises(ConfigError, match="this ViT does not predict pixels; an MAE"):
        reconstruct.run(tmp_path, vit)
    blind = saved(tmp_path / "encoder", "mae_vit_micro_patch4_32", **SHAPE, decoder_depth=0)
    with pytest.raises(ConfigError, match="this MAE does not predict pixels"):
        reconstruct.run(tmp_path, blind)
    with pytest.raises(ConfigError, match="name its file"):
        reconstruct.run(tmp_path, mae, data=str(pictures), boxes=[(0, 0, 8, 8)])
    with pytest.raises(ConfigError, match="not whole patches of 8"):
        reconstruct.run(tmp_path, mae, given={"scheme": "cells", "cell": 12})


# -------------------------------------------------------------------------------------------------------------- inputs


def test_pictures_that_cannot_be_looked_at(vit, pictures, tmp_path):
    with pytest.raises(MissingInputError, match="no such file or folder"):
        inputs.open_pictures(str(tmp_path / "nowhere"), None, 4)
    with pytest.raises(DataError, match="there is no picture"):
        inputs.open_pictures(str(tmp_path), None, 4)
    with pytest.raises(ConfigError, match="at least one picture"):
        inputs.open_pictures(str(pictures), None, 0)
    (tmp_path / "broken.png").write_bytes((pictures / "000.png").read_bytes()[:200])
    with pytest.raises(DataError, match="broken.png: truncated"):
        inputs.open_pictures(str(tmp_path), None, 4).read[0]()
    tiny.pictures(1, px=24)[0].save(tmp_path / "broken.png")
    with pytest.raises(DataError, match="broken.png has 32x24 pixels, the model looks at 32x32"):
        next(inputs.open_pictures(str(tmp_path / "broken.png"), None, 4).batches([inputs.open_model(vit)]))


def test_pictures_are_spread_evenly(pictures):
    assert inputs.open_pictures(str(pictures), None, 3).names == ("000.png", "004.png", "008.png")
    assert len(inputs.open_pictures(str(pictures), None, 100)) == 9


def test_without_matplotlib_it_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install \"multiway\[plot\]\""):
        hiding.run(tmp_path / "out", hiding=Hiding())
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- scaling


def made_run(
    folder: Path, *, dim: int = 32, steps: int = 10, loss: float | None = 0.5, recipe: str = "mae.quick"
) -> Path:
    """What a run leaves behind, without having run."""
    run, _ = recipes.recipe(recipe)
    shape = dataclasses.replace(run.model, dim=dim, depth=2, heads=2, hidden=2 * dim)
    folder.mkdir()
    config.save(dataclasses.replace(run, model=shape), folder / "run.json")
    rows = [{"step": step, "loss": 2 - step / steps} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {} if loss is None else {"pre-training": {"image": loss, "image/accuracy": 0.1, "pictures": 7}}
    (folder / "eval.jsonl").write_text(json.dumps({"step": steps, **found}) + "\n")
    return folder


@pytest.fixture
def scenes(monkeypatch):
    """Few embedded scenes."""
    monkeypatch.setattr(prepare, "SCENES", 20)
    scaling.embedded_pictures.cache_clear()
    yield
    scaling.embedded_pictures.cache_clear()


def test_scaling_of_runs_beside_the_published(scenes, capsys, tmp_path):
    sizes = {(16, 10): 0.6, (16, 20): 0.55, (16, 40): 0.57, (32, 10): 0.58, (32, 20): 0.5, (32, 40): 0.45}
    runs = [
        made_run(tmp_path / f"d{dim}-s{steps}", dim=dim, steps=steps, loss=loss) for (dim, steps), loss in sizes.items()
    ]
    found = diagnosed(capsys, tmp_path / "out", "scaling", *runs, "--published")
    points = {point["name"]: point for point in found["runs"]["points"]}
    assert found["runs"]["rises"] == [["d16-s20", "d16-s40"]]
    assert points["d16-s10"]["pictures"] == 10 and points["d16-s10"]["loss"] == 0.6
    assert points["d32-s20"]["compute"] == pytest.approx(2 * points["d32-s10"]["compute"])
    assert found["runs"]["laws"]["parameters"] is None and found["runs"]["laws"]["compute"]["b"] > 0
    assert found["published"]["spearman"]["all"] == pytest.approx(-0.897, abs=5e-4)


def test_compute_is_that_of_the_matrix_products(scenes, tmp_path):
    """Three times the forward, within a tenth of 2 per parameter and token, of the encoder on a quarter of the patches
    and of the decoder on all.
    """
    _, point, held_out = scaling.read_run(made_run(tmp_path / "run", dim=96, steps=10))
    run, module = recipes.recipe("mae.quick")
    shape = dataclasses.replace(run.model, dim=96, depth=2, heads=2, hidden=192)
    model = create_model("mae_vit_micro_patch4_32", **dataclasses.asdict(shape))
    assert held_out and point.parameters == sum(own.numel() for own in model.encoder.parameters())
    blocks = sum(own.numel() for own in model.encoder.blocks.parameters()) * 17
    decoder = sum(own.numel() for own in model.decoder.blocks.parameters()) * 65
    ends = model.encoder.embed.weight.numel() * 64 + model.decoder.embed.weight.numel() * 17
    ends += model.decoder.pixels.weight.numel() * 48
    assert point.compute == pytest.approx(3 * 2 * (blocks + decoder + ends) * 128 * 10, rel=0.1)


def test_without_held_out_pictures_the_training_loss_is_taken_and_said(scenes, tmp_path):
    study = scaling.of_runs([made_run(tmp_path / "a", loss=None)])
    assert study.loss == "training loss (no held-out pictures) of mae"
    assert study.points[0].loss == 1.0 and study.points[0].steps == 10  # of the last tenth of ten steps


def test_runs_that_cannot_be_compared(scenes, tmp_path):
    first = made_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="b measured no held-out pictures"):
        scaling.of_runs([first, made_run(tmp_path / "b", loss=None)])
    with pytest.raises(ConfigError, match="runs of mae and vit"):
        scaling.of_runs([first, made_run(tmp_path / "c", recipe="vit.quick")])
    with pytest.raises(MissingInputError, match="a run folder keeps its settings in run.json"):
        scaling.of_runs([tmp_path / "nowhere"])
    for name in ("metrics.jsonl", "eval.jsonl"):
        (first / name).unlink()
    with pytest.raises(DataError, match="train it first"):
        scaling.of_runs([first])
    with pytest.raises(ConfigError, match="nothing to study"):
        scaling.run(tmp_path, [])


def test_the_published_points_say_what_the_study_says():
    """vision.md 7.7: the correlations, and where over-fitting begins."""
    study = scaling.of_publication()
    assert len(study.points) == 63
    expected = {"all": -0.897, "49 M": -0.643, "87 M": -0.874, "195 M": -0.975, "655 M": -0.944, "1.06 B": -0.917}
    assert scaling.correlations(study) == pytest.approx(expected, abs=5e-4)
    loss, accuracy = study.column("loss"), study.column("accuracy")
    assert np.corrcoef(loss, accuracy)[0, 1] == pytest.approx(-0.786, abs=5e-4)
    worse = {after.name for _, after in scaling.rises(study.points)}
    assert {"S, 10% of IN-1k, 250k steps", "H, 20% of IN-1k, 250k steps", "g, 50% of IN-1k, 500k steps"} <= worse
    assert not any(data in name for name in worse for data in (", IN-1k,", "IN-22k"))


def test_laws_of_the_published_points():
    """More parameters and more compute go on helping; more pictures than ImageNet-1k do not."""
    study = scaling.of_publication()
    compute, parameters, pictures = (scaling.law_of(study, axis) for axis in ("compute", "parameters", "pictures"))
    for law, axis in ((compute, "compute"), (parameters, "parameters")):
        x, loss = scaling.best_of(study, axis)
        np.testing.assert_allclose(law(x), loss, atol=0.002)
        assert law.b > 0.02 and law(np.array([x[-1]])) - law(np.array([10 * x[-1]])) > 0.004
    many = np.array([1.4e7, 1.4e8])
    assert np.ptp(pictures(many)) < 0.002


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0.00"), (1.0, "1.00"), (0.9999999, "1.00"), (15.23, "15.2"), (1234.0, "1,234"), (-0.05, "-0.0500"),
     (2.5e-5, "2.50·10⁻⁵"), (3e17, "3.00·10¹⁷"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers_as_people_read_them(value, told):
    assert number(value) == told
