"""FLAVA's steps, of one kind each or of all, in two processes are those of one, and a run resumes to the bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from multiway.data.collate import MaskedCollate
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import Corpus, Load
from multiway.engine.train import Job, train
from multiway.nn.quantize import PatchCodebook
from multiway.recipes.flava import Pretrain
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule
from multiway.systems.flava import FLAVA, Config, MaskedContrastiveMatching
from tests.engine import test_joint
from tests.engine.test_joint import far, same
from tests.engine.tiny import WORDS, Records, rows

MODEL = Config(
    dim=32, depth=2, heads=2, hidden=64, patch=8, image_px=32, text_depth=2, joint_depth=1, vocab=40, text_tokens=12,
    out=16, codes=8, drop_path=0.2, init_std=0.1,
)  # fmt: skip
KINDS = ("image", "pair", "text")


def tiny(shares: dict[str, float], **changes: Any) -> Run:
    run = Run(
        recipe="tiny", model=MODEL, objective=Pretrain(shares=shares, mismatch=0.4, whole_words=False),
        data=Data(images=8, pairs=8, texts=8), optim=Optim(lr=3e-3, clip=0.5, ema=0.9),
        schedule=Schedule(steps=6, warmup=1), parallel=Parallel(precision="fp32", threads=1),
        checkpoint=Checkpoint(every=2), log=Log(), seed=5,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def build(run: Run) -> Job:
    """What a recipe's ``build`` does, for records in memory."""
    torch.manual_seed(run.seed)
    codebook = PatchCodebook(MODEL.codes, MODEL.patch)
    objective = MaskedContrastiveMatching(FLAVA(run.model), codebook)
    objective.init_weights()
    codebook.load_centroids(torch.rand(codebook.centroids.shape).numpy())
    sources: dict[str, Any] = {kind: [Records(kind)] for kind in KINDS}
    corpus = Corpus(sources=sources, weights=dict.fromkeys(KINDS), tokenizer=None, hash="")
    view, settings = View(px=32, scale=(0.4, 1.0)), run.objective
    load = Load(corpus=corpus, views={"image": view, "pair": view}, seed=run.seed, mismatch=settings.mismatch)
    collate = MaskedCollate(
        words=WORDS, grid=(4, 4), branches=2 * objective.model.layers, contrast=True, leading=2, match=True
    )
    streams = [Stream(kind=kind, sources=sources[kind], items=8, seed=run.seed) for kind in KINDS]

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")

    batches = Batches(streams, load, collate, settings.shares or None)
    return Job(objective=objective, batches=batches, data_hash="", export=export)


def work(run: Run, out: Path) -> None:
    train(run, build, out)


@pytest.fixture(autouse=True)
def this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_joint, "work", work)


@pytest.mark.parametrize("shares", [dict.fromkeys(KINDS, 1.0), {}], ids=["one kind a step", "all kinds"])
def test_two_processes_make_the_steps_of_one(shares: dict[str, float], tmp_path: Path) -> None:
    run = tiny(shares)
    want = test_joint.result(1, run, tmp_path / "one")
    terms = [{name for name in row if f"{name}/accuracy" in row} for row in want[0]]
    of_pairs = {"pair_image", "pair_text", "contrast", "match"}
    assert set(map(frozenset, terms)) <= (
        {frozenset({"image"}), frozenset({"text"}), frozenset(of_pairs)}
        if shares
        else {frozenset(of_pairs | {"image", "text"})}
    )
    assert set().union(*terms) >= of_pairs
    others = {"joined": far(run, micro=2, shard="replicate"), **({"sharded": run} if shares else {})}
    for name, other in others.items():
        same(test_joint.result(2, other, tmp_path / name), want)


def test_turns_go_on_where_they_stopped(tmp_path: Path) -> None:
    """Also where some parameters have had no gradient yet."""
    run = tiny(dict.fromkeys(KINDS, 1.0), seed=7)
    out = tmp_path / "run"
    lines, want = test_joint.result(1, run, out)
    for step in sorted((out / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(step)
    shutil.rmtree(out / "final")
    again, got = test_joint.result(1, run, out)
    assert len(again) == len(lines) == 6 and "resumed" in out.with_suffix(".log").read_text()
    assert all(torch.equal(got[name], x) for name, x in want.items())
    assert len({frozenset(row) for row in rows(out / "metrics.jsonl")}) > 1
