"""CLIP and SigLIP in two processes, sharded by FSDP2, are those of one; so are their gathered negatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multiway.data.collate import DualCollate, Words
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import Corpus, Load
from multiway.engine.train import Job, train
from multiway.recipes.pairs import Contrast
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule
from multiway.systems import clip, siglip
from multiway.tasks.retrieval import ImageTextContrast, ImageTextSigmoid
from tests.engine.ranks import Ranks
from tests.engine.tiny import WORDS, Records, rows

TOWER = {"dim": 32, "depth": 2, "heads": 2, "hidden": 64, "patch": 8, "image_px": 32, "vocab": 40, "text_tokens": 12}
MODELS: dict[str, Any] = {
    "clip": clip.Config(**TOWER, out=16, text_dim=24, text_depth=2, text_heads=2, text_hidden=48),
    "siglip": siglip.Config(**TOWER),
}


def tiny(model: str, **changes: Any) -> Run:
    run = Run(
        recipe="tiny", model=MODELS[model], objective=Contrast(), data=Data(pairs=8),
        optim=Optim(lr=3e-3, clip=0.5), schedule=Schedule(steps=4, warmup=1),
        parallel=Parallel(precision="fp32", threads=1), checkpoint=Checkpoint(every=100), log=Log(), seed=5,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def build(run: Run, hot: bool) -> Job:
    """What a recipe's ``build`` does, for records in memory; ``hot``: the temperature begins above its limit."""
    torch.manual_seed(run.seed)
    objective: Any
    if isinstance(run.model, clip.Config):
        objective = ImageTextContrast(clip.CLIP(run.model), run.objective.negatives)
    else:
        objective = ImageTextSigmoid(siglip.SigLIP(run.model))
    objective.init_weights()
    if hot:
        torch.nn.init.constant_(objective.model.logit_scale, 5.0)
    words: Words = WORDS
    source: Any = Records("pair")
    corpus = Corpus(sources={"pair": [source]}, weights={"pair": None}, tokenizer=None, hash="")
    load = Load(corpus=corpus, views={"pair": View(px=32, scale=(0.4, 1.0))}, seed=run.seed)
    collate = DualCollate(words=words, grid=(4, 4), causal=objective.model.causal)
    stream = Stream(kind="pair", sources=[source], items=run.data.pairs, seed=run.seed)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")

    return Job(objective=objective, batches=Batches([stream], load, collate), data_hash="", export=export)


def work(run: Run, out: Path, hot: bool) -> None:
    train(run, partial(build, hot=hot), out)


def result(world: int, run: Run, out: Path, hot: bool = False) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and gradient norms of all steps, and the final weights."""
    with Ranks(world, work, run, out, hot, log=out.with_suffix(".log")) as ranks:
        assert ranks.wait() == [0] * world, ranks.said
    found = rows(out / "metrics.jsonl")
    weights = load_file(out / "final" / "model.safetensors")
    return [row["loss"] for row in found], [row["grad_norm"] for row in found], weights


def far(run: Run, **changes: Any) -> Run:
    return dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, **changes))


def test_clip_in_two_processes_is_that_of_one(tmp_path: Path) -> None:
    run = tiny("clip")
    losses, norms, weights = result(1, run, tmp_path / "one", hot=True)
    assert losses[-1] < losses[0]
    others = {
        "sharded": run,
        "detached": dataclasses.replace(run, objective=Contrast(negatives="detached")),
        "joined": far(run, micro=2, shard="replicate"),
    }
    for name, other in others.items():
        own = result(2, other, tmp_path / name, hot=True)
        assert own[0] == pytest.approx(losses, rel=1e-5), name
        assert own[1] == pytest.approx(norms, rel=1e-4), name
        assert all((own[2][key] - x).abs().max() < 5e-5 for key, x in weights.items()), name
    assert 0 < weights["logit_scale"] <= clip.MAX_LOGIT_SCALE + 1e-6 < 5


def test_siglip_in_two_processes_is_that_of_one(tmp_path: Path) -> None:
    run = tiny("siglip")
    losses, norms, weights = result(1, run, tmp_path / "one")
    own = result(2, far(run, micro=2), tmp_path / "two")
    assert own[0] == pytest.approx(losses, rel=1e-5)
    assert own[1] == pytest.approx(norms, rel=1e-4)
    assert all((own[2][key] - x).abs().max() < 5e-5 for key, x in weights.items())


def test_local_negatives_make_another_loss_in_two_processes(tmp_path: Path) -> None:
    run = tiny("clip", objective=Contrast(negatives="local"), schedule=Schedule(steps=1, warmup=0))
    one, two = (result(world, run, tmp_path / str(world))[0] for world in (1, 2))
    assert two[0] < 0.9 * one[0]
