"""Captioning from the recipe to the scorer's file: published figures, two steps, an evaluation, the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from multiway import config, evaluation, pretrained
from multiway.cli import main
from multiway.data import prepare
from multiway.engine.train import train
from multiway.errors import ConfigError, WriteError
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained
from multiway.recipes import beit3
from multiway.recipes.captioning import Caption
from multiway.run import Run
from multiway.tasks.captioning import Captioning
from tests import tiny

SMALL = ["--model.dim=32", "--model.heads=2", "--model.hidden=32", "--model.depth=2", "--model.image_px=32"]
SMALL += ["--data.pairs=4", "--schedule.steps=2", "--schedule.warmup=1", "--parallel.threads=1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures with captions, split into train and val."""
    for split, count in (("train", 12), ("val", 5)):
        paths = tiny.write_pictures(tmp_path / f"pictures_{split}", count, seed=count)
        rows = [
            {"image": f"pictures_{split}/{p.name}", "captions": tiny.CAPTIONS[i : i + 2]} for i, p in enumerate(paths)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a random model."""
    made = tiny.pretrained(codes=0, contrast=False)
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def two_steps(run: Run, out: Path, *options: str) -> None:
    train(config.override(run, [*SMALL, *options]), partial(beit3.build, out=out), out)


@pytest.mark.parametrize(("name", "lr", "parameters"), [("base", 4e-5, 270_751_754), ("large", 8e-6, 739_033_610)])
def test_published_figures(name: str, lr: float, parameters: int) -> None:
    """masked.md 6.1, 6.3, 6.5."""
    run = getattr(beit3, f"{name}_captioning")()
    with torch.device("meta"):
        model = beit3.BEiT3(run.model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (run.model.image_px, run.model.drop_path, run.data.pairs, run.data.text_tokens) == (480, 0.1, 256, 32)
    assert (run.optim.lr, run.optim.layer_decay, run.optim.betas, run.optim.weight_decay) == (
        lr,
        1.0,
        (0.9, 0.999),
        0.05,
    )
    assert run.schedule.steps == 10 * run.schedule.warmup == pytest.approx(10 * 5 * 113_287 / 256, rel=1e-3)
    assert run.objective == Caption(ratio=0.7, smoothing=0.1, drop=0.2, drop_after=12_000, beams=3, length_penalty=0.6)


def test_it_trains_starts_from_a_pre_trained_model_and_evaluates(folder: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    two_steps(beit3.photos(), first, f"--data.root={folder}", "--data.images=2", "--data.texts=2", "--model.codes=8")
    two_steps(
        beit3.quick_captioning(), out, f"--data.root={folder}", f"--init={first / 'final'}", "--optim.lr=0",
        "--optim.weight_decay=0",
    )  # fmt: skip
    before, after = (pretrained.load(path).model.state_dict() for path in (first / "final", out / "final"))
    assert {"mlm_head.weight", "language.words.weight"} < set(after) < set(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    [figures] = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert figures["captioning"]["pictures"] == 5
    assert set(figures["captioning"]["floor"]) >= {"caption", "cider_d", "bleu4"}


def test_micro_batches_learn_and_drop_the_same(folder: Path, tmp_path: Path) -> None:
    """Also where the worst words are dropped, by the quantile of the step before."""
    runs = []
    for micro in (1, 2):
        out = tmp_path / f"micro-{micro}"
        options = ["--objective.drop_after=0", "--schedule.steps=4", f"--parallel.micro={micro}"]
        two_steps(beit3.quick_captioning(), out, f"--data.root={folder}", *options)
        runs.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*runs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["caption/dropped"] == one["caption/dropped"]
    assert runs[0][0]["caption/dropped"] == 0 and any(row["caption/dropped"] > 0 for row in runs[0][1:])


def test_without_data_it_captions_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SCENES", 400)
    monkeypatch.setattr(evaluation, "HELD_OUT", 6)
    two_steps(beit3.quick_captioning(), tmp_path, "--objective.beams=1")
    [figures] = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert figures["captioning"]["pictures"] == 6
    assert evaluation.evaluate_model(str(tmp_path), "captioning")["pictures"] == 6


def test_the_evaluation_writes_what_the_scorer_reads(folder: Path, saved: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "predictions.json"
    command = f"evaluate {saved} --task captioning --data {folder} --split val --predictions {file}"
    main(command.split())
    figures = json.loads(capsys.readouterr().out)
    rows = json.loads(file.read_text())
    assert [row["image_id"] for row in rows] == [f"pictures_val/{i:03d}.png" for i in range(5)]
    assert all(set(row) == {"image_id", "caption"} for row in rows)
    assert figures["pictures"] == 5 and figures["different"] == len({row["caption"] for row in rows})
    words = evaluation.evaluate_model(str(saved), "captioning", str(folder), "val")
    assert words == figures
    letters = evaluation.evaluate_model(str(saved), "captioning", str(folder), "val", unit="characters")
    assert letters["floor"]["caption"] == words["floor"]["caption"] and letters["floor"] != words["floor"]
    with pytest.raises(ConfigError, match="name them with --data"):
        evaluation.evaluate_model(str(saved), "captioning", predictions=str(file))
    with pytest.raises(WriteError, match="cannot write the captions to"):
        evaluation.evaluate_model(str(saved), "captioning", str(folder), "val", predictions=str(tmp_path / "no" / "x"))


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("val2014/COCO_val2014_000000391895.jpg", 391895),
        ("val2017/000000000139.jpg", 139),
        ("images/1000268201_693b08cb0e.jpg", "images/1000268201_693b08cb0e.jpg"),
        ("7.png", "7.png"),
    ],
)
def test_pictures_are_numbered_as_coco_names_them(key: str, number: int | str) -> None:
    assert evaluation.image_id(key) == number


def test_pictures_are_captioned_from_the_command_line(folder: Path, saved: Path, capsys) -> None:
    paths = [str(path) for path in sorted((folder / "pictures_val").glob("*.png"))[:2]]
    main(["caption", str(saved), *paths, "--beams", "2"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    model = pretrained.load(saved)
    assert lines == [[path, text] for path, text in zip(paths, evaluation.captions(model, paths, beams=2), strict=True)]


def test_what_cannot_caption_is_refused_with_what_could(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    picture_only = pretrained.create_model("vit_tiny_patch16_224", dim=32, depth=1, heads=2, hidden=32, image_px=32)
    pretrained.save_pretrained(picture_only, tmp_path / "vit")
    with pytest.raises(ConfigError, match="captioning needs a model that encodes image with text; ViT encodes image"):
        evaluation.evaluate_model(str(tmp_path / "vit"), "captioning", str(folder), "val")
    tiny.pretrained(masked=False).save_pretrained(tmp_path / "itc")
    with pytest.raises(ConfigError, match="fills in hidden words, such as a BEiT-3"):
        evaluation.evaluate_model(str(tmp_path / "itc"), "captioning", str(folder), "val")
    bare = tiny.pretrained()
    with pytest.raises(ConfigError, match="one beam or more, got 0"):
        evaluation.captions(bare, tiny.pictures(1), beams=0)
    with pytest.raises(ConfigError, match="has no tokenizer: captions need the one it was tuned with"):
        evaluation.captions(Pretrained(bare.model, None, Preprocessor.of(bare.model.config, None)), tiny.pictures(1))


@pytest.mark.parametrize("setting", ["ratio=0", "ratio=1.5", "smoothing=1", "drop=1", "beams=0"])
def test_settings_that_make_no_sense_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="expected ratio above 0 and at most 1"):
        config.override(beit3.quick_captioning(), [f"--objective.{setting}"])


def test_settings_reach_the_objective() -> None:
    run = config.override(beit3.quick_captioning(), ["--objective.ratio=0.5", "--objective.drop_after=7"])
    from multiway.rehearsal import made_up_words

    objective, collate = beit3.assemble(run, made_up_words(run))
    assert isinstance(objective, Captioning) and objective.drop_after == 7
    assert collate.ratio == 0.5 and collate.branches == 2 * run.model.depth  # type: ignore[attr-defined]
