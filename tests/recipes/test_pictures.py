"""Runs of pictures alone, from the folder to the figures: a few steps of tiny models through the loop."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multiway import config, evaluation, pretrained
from multiway.cli import main
from multiway.data import prepare
from multiway.data.collate import Sample
from multiway.engine.train import train
from multiway.errors import ConfigError, DataError
from multiway.recipes import pictures, recipe
from multiway.systems.mae import MAE
from multiway.systems.vit import ViT
from tests import tiny

CLASSES = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 40, 50)}
TINY = ["--model.dim=32", "--model.depth=2", "--model.heads=2", "--model.hidden=64", "--model.image_px=32"]
TINY += ["--model.drop_path=0.2", "--data.images=8", "--optim.ema=0.5", "--parallel.threads=1"]
TINY_MAE = ["--model.decoder_dim=16", "--model.decoder_depth=1", "--model.decoder_heads=2"]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the embedded scenes."""
    monkeypatch.setattr(prepare, "SCENES", 200)
    monkeypatch.setattr(prepare, "HELD_OUT_DIGITS", 40)


def write(folder: Path, count: int, colour: tuple[int, int, int], seed: int = 0) -> None:
    """Pictures of about one colour, of two sizes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *colour])
    for i in range(count):
        pixels = np.clip(colour + rng.normal(0, 25, (40, 36 + 8 * (i % 2), 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of each of three classes to train on; five of each of two of them are held out."""
    for name, colour in CLASSES.items():
        write(tmp_path / "data" / "train" / name, 12, colour)
        if name != "green":
            write(tmp_path / "data" / "val" / name, 5, colour, seed=1)
    return tmp_path / "data"


def train_run(name: str, out: Path, *options: str, steps: int = 2) -> dict[str, Any]:
    """Train a tiny run and return its last figures."""
    mae = TINY_MAE if name == "mae.quick" else []
    sizes = [option for option in TINY if not (mae and "drop_path" in option)]
    run, module = recipe(name)
    run = config.override(
        run, [*sizes, *mae, f"--schedule.steps={steps}", "--schedule.warmup=1", "--checkpoint.every=2", *options]
    )
    return train(run, partial(module.build, out=out), out)


def rows(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


EVERYTHING = ["--objective.mixup=0.8", "--objective.cutmix=1", "--objective.erase=0.5", "--objective.augment=true"]
RUNS = {
    "classes": ("vit.quick", []),
    "classes, all augmentation, on other scenes": ("vit.quick", [*EVERYTHING, "--model.pool=mean", "--seed=1"]),
    "masked": ("mae.quick", []),
}


@pytest.mark.parametrize(("name", "options"), RUNS.values(), ids=RUNS)
def test_a_run_on_embedded_scenes_resumes_exactly(name: str, options: list[str], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    figures = train_run(name, whole, *options, steps=4)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "step-000000004")
    assert train_run(name, cut, *options, steps=4) == figures
    weights, again = (pretrained.load(out).model.state_dict() for out in (whole, cut))
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    losses = [row["loss"] for row in rows(whole)]
    assert np.isfinite(losses).all() and len(set(losses)) == 4
    assert losses == [row["loss"] for row in rows(cut)]


def test_classes_are_learned_exported_and_measured(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    settings = [f"--data.root={folder}", "--data.images=12", "--optim.lr=3e-3", "--optim.ema=0", "--model.drop_path=0"]
    figures = train_run("vit.quick", out, *settings, steps=30)
    assert figures["image_classification"]["top1"] == 1.0
    assert figures["image_classification"]["pictures"] == 10 and figures["image_classification"]["chance"] == 1 / 3
    assert rows(out)[-1]["label/accuracy"] > rows(out)[0]["label/accuracy"]

    loaded = pretrained.load(out)
    assert isinstance(loaded.model, ViT) and loaded.preprocessor.labels == list(CLASSES) and loaded.tokenizer is None
    paths = sorted((folder / "train").glob("*/0.png"))
    probabilities = loaded.classify(paths)
    assert probabilities.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))

    main(["evaluate", str(out), "--task", "image_classification", "--data", str(folder), "--split", "val"])
    measured = json.loads(capsys.readouterr().out)  # the held-out pictures lack a class: numbers are those of the model
    assert measured["top1"] == 1.0 and measured["pictures"] == 10
    assert measured["loss"] == pytest.approx(figures["image_classification"]["loss"], rel=1e-4)
    probed = evaluation.evaluate_model(str(out), "linear_probe", str(folder))
    assert probed["linear"] == probed["knn"] == 1.0 and probed["classes"] == 3
    within = evaluation.evaluate_model(str(out), "linear_probe", str(folder), "train")
    assert within["linear"] == 1.0


def test_masked_weights_are_tuned(folder: Path, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "mae", tmp_path / "tuned"
    figures = train_run("mae.quick", first, f"--data.root={folder}")
    assert figures["pre-training"]["pictures"] == 10 and 0.1 < figures["pre-training"]["image"] < 10
    assert isinstance(pretrained.load(first).model, MAE)
    train_run("mae.quick_tune", second, f"--data.root={folder}", f"--init={first}", "--optim.lr=0", "--optim.ema=0")
    before, after = (pretrained.load(out).model.state_dict() for out in (first, second))
    assert {key for key in after if key.startswith("encoder.")} == {k for k in before if k.startswith("encoder.")}
    for key, tensor in after.items():
        if key.startswith("encoder."):
            assert torch.equal(tensor, before[key]), key
    assert (after["norm.weight"] == 1).all() and before["norm.weight"].std() > 0, "the mean has a norm of its own"
    assert after["head.weight"].shape == (3, 32)
    told = " ".join(capsys.readouterr().err.split())
    assert "new here: norm (2), head (2); not needed from there: norm (2), decoder" in told


def test_weights_are_resized_to_other_pictures(folder: Path, tmp_path: Path) -> None:
    train_run("vit.quick", tmp_path / "small", f"--data.root={folder}")
    settings = [f"--data.root={folder}", "--model.image_px=48", "--optim.lr=0", "--optim.ema=0"]
    train_run("vit.quick", tmp_path / "large", *settings, f"--init={tmp_path / 'small'}")
    want = pretrained.load(tmp_path / "small").model
    want.set_image_size(48)
    after = pretrained.load(tmp_path / "large").model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in want.state_dict().items()), "its head as well"


@pytest.mark.parametrize("what", ["width", "system"])
def test_weights_that_do_not_fit_are_refused_by_name(what: str, folder: Path, tmp_path: Path) -> None:
    init = tmp_path / "init"
    if what == "width":
        train_run("vit.quick", init, f"--data.root={folder}", "--model.dim=16")
    else:
        tiny.pretrained().save_pretrained(init)
    with pytest.raises(ConfigError, match=r"init does not fit this model's encoder: it has no encoder\.\w+"):
        train_run("vit.quick", tmp_path / "out", f"--data.root={folder}", f"--init={init}")


def test_another_number_of_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the data has 3 classes, model.classes is 5: set it to 3, or to 0"):
        train_run("vit.quick", tmp_path / "out", f"--data.root={folder}", "--model.classes=5")


def test_held_out_classes_that_training_lacks_are_refused(folder: Path, tmp_path: Path) -> None:
    write(folder / "val" / "violet", 2, (150, 40, 200))
    with pytest.raises(DataError, match="1 classes the training has not: violet"):
        train_run("vit.quick", tmp_path / "out", f"--data.root={folder}")
    train_run("vit.quick", tmp_path / "other", f"--data.root={folder / 'train'}")
    with pytest.raises(ConfigError, match="the model does not know violet"):
        evaluation.evaluate_model(str(tmp_path / "other"), "image_classification", str(folder), "val")
    with pytest.raises(DataError, match="classes of val that train has not: violet"):
        evaluation.evaluate_model(str(tmp_path / "other"), "linear_probe", str(folder))


def test_pictures_without_a_class_are_refused_and_can_be_masked(tmp_path: Path) -> None:
    write(tmp_path / "data" / "red", 6, CLASSES["red"])
    write(tmp_path / "loose", 3, CLASSES["blue"])
    for path in (tmp_path / "loose").glob("*.png"):
        shutil.copy(path, tmp_path / "data" / f"loose-{path.name}")
    with pytest.raises(DataError, match=r"3 of 9 pictures have no class.*folder per class.*\n  loose-0.png"):
        train_run("vit.quick", tmp_path / "out", f"--data.root={tmp_path / 'data'}")
    train_run("mae.quick", tmp_path / "mae", f"--data.root={tmp_path / 'data'}")
    with pytest.raises(DataError, match="linear_probe needs labels"):
        evaluation.evaluate_model(str(tmp_path / "mae"), "linear_probe", str(tmp_path / "loose"))
    with pytest.raises(ConfigError, match="at least two classes"):
        evaluation.evaluate_model(str(tmp_path / "mae"), "linear_probe", str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="mae has no classifier: tune it"):
        evaluation.evaluate_model(str(tmp_path / "mae"), "image_classification", str(tmp_path / "data"))


def test_pictures_with_captions_are_pictures(folder: Path, tmp_path: Path) -> None:
    """Of a folder where some have captions all are trained on and measured."""
    for path in [*(folder / "train").glob("*/*0.png"), *(folder / "val").glob("red/*.png")]:
        path.with_suffix(".txt").write_text("a picture of about one colour\n")
    run, module = recipe("vit.quick")
    run = config.override(run, [*TINY, f"--data.root={folder}", "--data.vocab=64"])
    job = module.build(run, tmp_path / "out")
    [stream] = job.batches.streams
    assert sorted(len(source) for source in stream.sources) == [6, 30]
    assert {place.source for step in range(5) for place in stream.places(step)} == {0, 1}
    assert job.evaluate(job.objective.model)["image_classification"]["pictures"] == 10


def test_mixed_roots_keep_their_weights(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "train").glob("*/*0.png"):
        path.with_suffix(".txt").write_text("a picture of about one colour\n")
    other = tmp_path / "other"
    for name, colour in CLASSES.items():
        write(other / name, 4, colour)
    run, module = recipe("vit.quick")
    more = json.dumps({str(other): 0.5})
    run = config.override(run, [*TINY, f"--data.root={folder / 'train'}", f"--data.more={more}", "--data.vocab=64"])
    [stream] = module.build(run, tmp_path / "out").batches.streams
    found = {len(source): weight for source, weight in zip(stream.sources, stream.weights, strict=True)}
    assert found == {30: 1.0, 6: 1.0, 12: 0.5}


def test_an_odd_number_of_pictures_cannot_be_mixed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a micro-batch has 7 of them: take an even number"):
        train_run("vit.quick", tmp_path / "out", f"--data.root={folder}", "--data.images=7", "--objective.mixup=0.8")


def test_a_share_of_patches_that_is_none_is_refused() -> None:
    run, _ = recipe("mae.quick")
    for ratio in ("0", "1"):
        with pytest.raises(ConfigError, match="objective.ratio is a share of the patches"):
            config.override(run, [f"--objective.ratio={ratio}"])
    with pytest.raises(ConfigError, match="objective.cell is 20 pixels, expected a multiple of the patch, 8"):
        dataclasses.replace(run.objective, scheme="cells", cell=20).of((4, 4), 8)


@pytest.mark.parametrize(
    ("scheme", "hidden"), [("patches", 12), ("cells", 12), ("blocks", 12), ("square", 9), ("central square", 9)]
)
def test_every_scheme_of_hiding_makes_batches(scheme: str, hidden: int) -> None:
    run, module = recipe("mae.quick")
    options = [*TINY_MAE, "--model.image_px=32", f"--objective.scheme={scheme}", "--objective.cell=16"]
    objective, collate = module.assemble(config.override(run, options), pictures.no_words())
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    batch = collate({"image": [Sample(image=image, record=i, rng=np.random.default_rng(i)) for i in range(6)]})
    assert (batch["image_hide"].sum(1) == hidden).all() and batch["image_keep"].shape == (6, 16 - hidden)
    assert objective.counts(batch) == {"image": 6 * hidden}


# --- published recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "batch", "lr", "rest"),
    [  # vision.md 4.2, 4.3: rates per 256, epochs of ImageNet-1k
        ("mae.base", 800, 40, 4096, 1.5e-4, {}),
        ("mae.large", 800, 40, 4096, 1.5e-4, {}),
        ("mae.huge", 800, 40, 4096, 1.5e-4, {}),
        ("mae.base_tune", 100, 5, 1024, 5e-4, {"decay": 0.65, "drop_path": 0.1}),
        ("mae.large_tune", 50, 5, 1024, 1e-3, {"decay": 0.75, "drop_path": 0.2}),
        ("mae.huge_tune", 50, 5, 1024, 1e-3, {"decay": 0.75, "drop_path": 0.3}),
        ("vit.base", 300, 5, 1024, 2.5e-4, {"drop_path": 0.1, "ema": 0.99996}),  # 5e-4 per 512
    ],
)
def test_published_figures(name: str, epochs: int, warmup: int, batch: int, lr: float, rest: dict[str, float]) -> None:
    run, _ = recipe(name)
    epoch = 1_281_167 / batch
    assert run.schedule.steps == pytest.approx(epochs * epoch, abs=epochs)
    assert run.schedule.warmup == pytest.approx(warmup * epoch, abs=warmup)
    assert run.data.images == batch and run.optim.lr == pytest.approx(lr * batch / 256)
    assert run.optim.weight_decay == 0.05 and run.optim.clip == 0 and run.data.jitter == 0
    assert run.optim.layer_decay == rest.get("decay", 1.0) and run.optim.ema == rest.get("ema", 0.0)
    if name.startswith("mae") and "tune" not in name:
        assert run.optim.betas == (0.9, 0.95) and run.schedule.final_lr == 0 and run.data.image_scale == 0.2
        assert run.model.normed and run.objective.scheme == "patches" and run.objective.ratio == 0.75
        return
    assert run.optim.betas == (0.9, 0.999) and run.data.image_scale == 0.08
    assert run.model.drop_path == rest["drop_path"] and run.model.classes == 1000
    assert run.objective == pictures.Classify(smoothing=0.1, mixup=0.8, cutmix=1.0, erase=0.25, augment=True)
    if "tune" in name:
        assert run.model.pool == "mean" and run.model.head_std == 2e-5 and run.schedule.final_lr == 1e-6


@pytest.mark.parametrize(("first", "then"), [("mae.quick", "mae.quick_tune"), ("mae.base", "mae.base_tune")])
def test_tuning_has_the_encoder_of_its_pre_training(first: str, then: str) -> None:
    module = importlib.import_module("multiway.recipes.mae")
    with torch.device("meta"):
        pre, tuned = (module.assemble(recipe(name)[0], pictures.no_words())[0].model for name in (first, then))
    assert {k: v.shape for k, v in pre.encoder.state_dict().items()} == {
        k: v.shape for k, v in tuned.encoder.state_dict().items()
    }
