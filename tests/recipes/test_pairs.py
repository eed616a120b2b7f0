"""The recipes of CLIP and SigLIP that a laptop can run, run: two steps each; and the figures of the published ones."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from multiway import config, evaluation, pretrained
from multiway.data import prepare
from multiway.engine.train import train
from multiway.errors import ConfigError
from multiway.recipes import clip, recipe, siglip

WORDS = ("red", "blue", "green", "dog", "cat", "house", "near", "under")
BOTH = pytest.mark.parametrize("module", [clip, siglip], ids=["clip", "siglip"])


def two_steps(module: ModuleType, out: Path, *options: str) -> list[dict]:
    """Train two steps of a quick recipe and return the lines of the metrics."""
    given = ["--schedule.steps=2", "--schedule.warmup=1", "--parallel.threads=1", "--data.pairs=8", *options]
    run = config.override(module.quick(), given)
    train(run, partial(module.build, out=out), out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fiftieth of the embedded scenes."""
    monkeypatch.setattr(prepare, "SCENES", 400)
    monkeypatch.setattr(evaluation, "HELD_OUT", 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures with captions, split into train and val."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    root.mkdir()
    for split, count in (("train", 16), ("val", 6)):
        rows = []
        for i in range(count):
            name = f"{split}-{i}.png"
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / name)
            rows.append(json.dumps({"image": name, "captions": [" ".join(rng.permutation(WORDS)[:4])]}))
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


@BOTH
def test_quick_trains_evaluates_and_is_tuned(module: ModuleType, tmp_path: Path) -> None:
    lines = two_steps(module, tmp_path / "quick")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["contrast"]) and 0 <= line["contrast/accuracy"] <= 1 for line in lines)
    [figures] = [json.loads(line) for line in (tmp_path / "quick" / "eval.jsonl").read_text().splitlines()]
    assert figures["retrieval"]["candidates"] == 40 and figures["zero_shot"]["classes"] == 10
    final = tmp_path / "quick" / "final"
    two_steps(module, tmp_path / "tuned", f"--init={final}", "--optim.lr=0", "--optim.weight_decay=0")
    before, after = (pretrained.load(path).model.state_dict() for path in (final, tmp_path / "tuned" / "final"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], x) for name, x in after.items())


@BOTH
def test_micro_batches_make_the_same_steps(module: ModuleType, folder: Path, tmp_path: Path) -> None:
    given = (f"--data.root={folder}", "--data.vocab=64", "--optim.matrices=adamw")
    one = two_steps(module, tmp_path / "one", *given)
    four = two_steps(module, tmp_path / "four", *given, "--parallel.micro=4")
    assert [line["loss"] for line in four] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    figures = json.loads((tmp_path / "four" / "eval.jsonl").read_text().splitlines()[-1])
    assert figures["retrieval"]["captions"] == 6


def test_half_of_the_patches_are_read_when_asked(tmp_path: Path) -> None:
    run = config.override(clip.quick(), ["--objective.keep=0.5", "--data.pairs=4"])
    batch, _ = clip.build(run, tmp_path).batches.batch(0)
    assert batch["image_keep"].shape == (4, 32)
    with pytest.raises(ConfigError, match="share of the patches"):
        config.override(clip.quick(), ["--objective.keep=1.5"])


def test_data_and_models_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    for option, said in (
        ("--model.vocab=40", "ids and up to 64 tokens, the model 40 and 64"),
        ("--model.text_tokens=20", "up to 64 tokens, the model 512 and 20"),
    ):
        with pytest.raises(ConfigError, match=said):
            clip.build(config.override(clip.quick(), [option]), tmp_path)
    (pictures := tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    with pytest.raises(
        ConfigError,
        match=r"does not fit clip.quick, a step of which takes \d+ pictures with captions .* set data.pairs to 0",
    ):
        clip.build(config.override(clip.quick(), [f"--data.root={pictures}"]), tmp_path)
    two_steps(siglip, tmp_path / "siglip", f"--data.root={folder}", "--data.vocab=64")
    given = [f"--init={tmp_path / 'siglip' / 'final'}", f"--data.root={folder}"]
    with pytest.raises(ConfigError, match="holds a SigLIP that does not fit this CLIP"):
        clip.build(config.override(clip.quick(), given), tmp_path)


@pytest.mark.parametrize(
    ("name", "px", "lr", "betas", "eps", "epochs"),
    [
        ("base_patch32", 224, 5e-4, (0.9, 0.98), 1e-6, 32),
        ("base_patch16", 224, 5e-4, (0.9, 0.98), 1e-6, 32),
        ("large_patch14", 224, 4e-4, (0.9, 0.98), 1e-6, 32),
        ("large_patch14_336", 336, 2e-5, (0.9, 0.98), 1e-6, 1),
        ("resnet50", 224, 5e-4, (0.9, 0.999), 1e-8, 32),
        ("resnet101", 224, 5e-4, (0.9, 0.999), 1e-8, 32),
        ("resnet50x4", 288, 5e-4, (0.9, 0.999), 1e-8, 32),
        ("resnet50x16", 384, 4e-4, (0.9, 0.999), 1e-8, 32),
        ("resnet50x64", 448, 3.6e-4, (0.9, 0.999), 1e-8, 32),
    ],
)
def test_published_figures(name: str, px: int, lr: float, betas: tuple[float, float], eps: float, epochs: int) -> None:
    """masked.md 8.1 and 8.2."""
    run, _ = recipe(f"clip.{name}")
    assert (run.model.image_px, run.optim.lr, run.optim.betas, run.optim.eps) == (px, lr, betas, eps)
    assert run.data.pairs == 32_768 and run.schedule.steps == epochs * (400_000_000 // 32_768)
    assert (run.optim.weight_decay, run.schedule.warmup, run.schedule.final_lr) == (0.2, 2000, 0.0)
    assert run.data.pair_scale == 0.9 and not run.data.flip and run.data.text_tokens == 77
