"""The recipes a laptop can run, run: two steps each, through the loop, on embedded scenes and on a folder of
pictures.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from multiway import config, evaluation, pretrained
from multiway.data import prepare
from multiway.data.index import build as build_index
from multiway.data.indexed import Index
from multiway.engine.train import train
from multiway.errors import ConfigError
from multiway.recipes import beit3, names, recipe
from multiway.recipes.pictures import IMAGE_TOKENIZER
from multiway.run import Run
from multiway.systems.vq_kd import VQKD
from multiway.systems.vq_kd import Config as VQKDConfig
from tests.contracts.toys import randomize

WORDS = ("red", "blue", "green", "dog", "cat", "house", "near", "under")


def two_steps(run: Run, out: Path, *options: str) -> list[dict]:
    """Train two steps and return the lines of the metrics."""
    run = config.override(run, ["--schedule.steps=2", "--schedule.warmup=1", "--parallel.threads=1", *options])
    train(run, partial(beit3.build, out=out), out)
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
    for split, count in (("train", 24), ("val", 6)):
        rows = []
        for i in range(count):
            name = f"{split}-{i}.png"
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / name)
            captions = [" ".join(rng.permutation(WORDS)[:4]) for _ in range(2)]
            rows.append(json.dumps({"image": name, "captions": captions}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_quick_trains_and_its_tuning_starts_from_it(tmp_path: Path) -> None:
    lines = two_steps(beit3.quick(), tmp_path / "quick")
    assert [line["step"] for line in lines] == [1, 2]
    terms = {"image", "pair_image", "pair_text", "text", "contrast"}
    assert all(np.isfinite([line[term] for term in terms]).all() for line in lines)
    final = tmp_path / "quick" / "final"
    two_steps(beit3.quick_itc(), tmp_path / "itc", f"--init={final}", "--optim.lr=0", "--optim.weight_decay=0")
    before, after = (pretrained.load(path).model.state_dict() for path in (final, tmp_path / "itc" / "final"))
    assert set(before) - set(after) == {
        f"{head}.{part}" for head in ("mlm_head", "mim_head") for part in ("weight", "bias")
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_contrast_reads_as_many_patches_as_asked(tmp_path: Path) -> None:
    run = config.override(beit3.quick_itc(), ["--objective.keep=0.5", "--data.pairs=6"])
    batches = beit3.build(run, tmp_path).batches
    batch, _ = batches.batch(0)
    keep = batch["image_keep"]
    assert keep.shape == (6, 8) and batch["plan"].part("image", "image") == 6 * 9
    assert (keep.diff(dim=1) > 0).all() and keep.min() >= 0 and keep.max() < 16
    assert len({tuple(row) for row in keep.tolist()}) == 6  # each picture its own
    assert torch.equal(batches.batch(0)[0]["image_keep"], keep)
    assert "image_keep" not in beit3.build(beit3.quick_itc(), tmp_path).batches.batch(0)[0]
    [first, second] = two_steps(run, tmp_path / "out")
    assert np.isfinite([first["contrast"], second["contrast"]]).all()


@pytest.mark.parametrize("keep", ["0", "1.5", "-1"])
def test_a_share_that_is_none_is_refused(keep: str) -> None:
    with pytest.raises(ConfigError, match="objective.keep is a share"):
        config.override(beit3.quick_itc(), [f"--objective.keep={keep}"])


def test_photos_trains_on_a_folder_and_evaluates_its_val_split(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ["--model.dim=32", "--model.heads=2", "--model.hidden=32", "--model.depth=2", "--model.image_px=32"]
    small += ["--model.codes=8", "--model.vocab=64", "--data.vocab=64"]
    lines = two_steps(
        beit3.photos(), out, f"--data.root={folder}", "--data.pairs=6", "--data.images=2", "--data.texts=2", *small
    )
    assert len(lines) == 2
    [figures] = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert (figures["retrieval"]["candidates"], figures["retrieval"]["captions"]) == (6, 12)
    assert len(list(out.glob("index/*/views/*/*/code.npy"))) == 2  # beside the data: crops of pictures and of pairs


def test_visual_tokens_lie_beside_the_data_and_serve_other_runs(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(folder, index, split="train", vocab=64)
    small = [f"--data.root={index}", "--model.codes=8", "--model.vocab=64", "--objective.views=2", "--data.pairs=8"]

    def codes(out: str, *settings: str) -> dict[Path, bytes]:
        run = config.override(beit3.photos(), [*small, *settings])
        job = beit3.build(run, tmp_path / out)
        assert not (tmp_path / out / "views").exists() and len(job.data_hash) > 64
        return {path: path.read_bytes() for path in index.glob("views/*/*/code.npy")}

    first = codes("a")
    times = {path: path.stat().st_mtime_ns for path in first}
    assert codes("b") == first and {path: path.stat().st_mtime_ns for path in first} == times
    other = codes("c", "--seed=1")  # other crops, another codebook
    assert set(first) < set(other) and len(other) == 2 * len(first)
    assert Index.open(index).hash  # still a whole index


def test_without_room_beside_the_data_visual_tokens_lie_below_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    build_index(folder, index, split="train", vocab=64)
    monkeypatch.setattr("multiway.data.prepare.os.access", lambda path, mode: path != index)
    run = config.override(beit3.photos(), [f"--data.root={index}", "--model.codes=8", "--model.vocab=64"])
    beit3.build(run, tmp_path / "out")
    assert not (index / "views").exists()
    assert len(list((tmp_path / "out" / "views").glob("*/*/code.npy"))) == 2


def test_the_codebook_that_targets_came_from_is_exported(tmp_path: Path) -> None:
    out = tmp_path / "out"
    two_steps(beit3.quick(), out)
    kept, exported = (load_file(path) for path in (out / "codebook.safetensors", out / "final" / IMAGE_TOKENIZER))
    assert kept.keys() == exported.keys() == {"centroids"} and torch.equal(kept["centroids"], exported["centroids"])


def test_texts_alone_have_no_visual_tokens(tmp_path: Path) -> None:
    out, alone = tmp_path / "out", ("--data.images=0", "--data.pairs=0", "--data.texts=4", "--objective.contrast=false")
    lines = two_steps(beit3.quick(), out, *alone, "--model.contrast=false")
    assert np.isfinite([line["text"] for line in lines]).all() and not lines[0].get("image")
    assert not (out / "final" / IMAGE_TOKENIZER).exists()
    assert "masked" not in json.loads((out / "eval.jsonl").read_text().splitlines()[-1] or "{}")


@pytest.mark.parametrize("views", [0, 1])
def test_targets_are_those_of_a_vq_kd_that_is_named(views: int, tmp_path: Path) -> None:
    """As in the paper."""
    shape: Any = {"dim": 32, "depth": 1, "heads": 2, "hidden": 32, "patch": 16, "image_px": 64, "codes": 512}
    tokenizer = VQKD(VQKDConfig(**shape, code_dim=8, decoder_depth=1, teacher_dim=16))
    randomize(tokenizer)
    torch.nn.init.normal_(tokenizer.codebook.weight)
    pretrained.save_pretrained(tokenizer, tmp_path / "vq_kd")
    given = [f"--objective.tokenizer={tmp_path / 'vq_kd'}", f"--objective.views={views}", "--model.image_px=64"]
    given += ["--model.patch=16", "--data.pairs=6", "--data.images=2", "--data.texts=2"]
    job = beit3.build(config.override(beit3.quick(), given), tmp_path / "out")
    objective: Any = job.objective
    batch = job.batches.batch(0)[0]
    codes = objective.codes(batch)
    assert ("image_code" in batch) == bool(views) and len(codes.unique()) > 1
    assert torch.equal(codes[:2].flatten(1), tokenizer(batch["image"][:2]).flatten(1))
    assert not any("tokenizer" in name for name in objective.state_dict())
    lines = two_steps(beit3.quick(), tmp_path / "out", *given)
    assert np.isfinite([line["image"] for line in lines]).all()
    assert not (tmp_path / "out" / "final" / IMAGE_TOKENIZER).exists()  # it has a folder of its own
    with pytest.raises(ConfigError, match="16-pixel patches, this run's model has 8-pixel ones: .*set model.patch"):
        beit3.build(config.override(beit3.quick(), [*given, "--model.patch=8"]), tmp_path / "out")
    with pytest.raises(ConfigError, match="no image tokenizer of 8 codes"):
        beit3.build(config.override(beit3.quick(), [*given, "--model.codes=8"]), tmp_path / "out")


def test_a_vocabulary_too_small_for_the_tokenizer_and_texts_too_long_are_said(folder: Path, tmp_path: Path) -> None:
    run = config.override(beit3.photos(), [f"--data.root={folder}", "--data.vocab=64", "--model.vocab=16"])
    with pytest.raises(ConfigError, match=r"have \d+ ids and up to 40 tokens, the model 16 and 64: set model.vocab"):
        beit3.build(run, tmp_path / "out")
    run = config.override(beit3.photos(), [f"--data.root={folder}", "--data.vocab=64", "--data.window=65"])
    with pytest.raises(ConfigError, match=r"up to 65 tokens, the model 4096 and 64: set .*data.window"):
        beit3.build(run, tmp_path / "out")
    nothing = ["--data.pairs=0", "--data.images=0", "--data.texts=0", f"--data.root={folder}", "--data.vocab=64"]
    with pytest.raises(ConfigError, match=r"a step takes nothing: set data.pairs"):
        beit3.build(config.override(beit3.photos(), nothing), tmp_path / "out")


def test_weights_of_another_width_are_refused_by_name(tmp_path: Path) -> None:
    two_steps(beit3.quick(), tmp_path / "quick")
    run = dataclasses.replace(beit3.quick_itc(), model=dataclasses.replace(beit3.quick_itc().model, dim=64))
    with pytest.raises(ConfigError, match="of another shape.*vision"):
        two_steps(run, tmp_path / "itc", f"--init={tmp_path / 'quick' / 'final'}")


@pytest.mark.parametrize("name", [name for name, _ in names()])
def test_every_recipe_names_itself_and_its_batch_is_positive(name: str) -> None:
    run, _ = recipe(name)
    assert run.recipe == name
    assert run.data.images + run.data.texts + run.data.pairs + run.data.examples > 0
    assert run.schedule.warmup < run.schedule.steps
