"""VLMo in two processes, sharded by FSDP2, is that of one: hard negatives come from all; frozen weights stay."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multiway.data.collate import MaskedCollate, MatchCollate
from multiway.data.image import View
from multiway.data.loader import Batches, Stream
from multiway.data.prepare import Corpus, Load
from multiway.engine.train import Job, train
from multiway.recipes.vlmo import HiddenWords, Joint
from multiway.run import Checkpoint, Data, Log, Optim, Parallel, Run, Schedule
from multiway.systems.vlmo import Config, MaskedContrastMatching, MaskedLanguageModeling, VLMo, reads_text
from tests.engine.ranks import Ranks
from tests.engine.tiny import WORDS, Records, rows

MODEL = Config(
    dim=32, depth=3, heads=2, hidden=64, patch=8, image_px=32, joint_layers=1, vocab=40, text_tokens=12, drop_path=0.2,
    layer_scale=0.0, init_std=0.1,
)  # fmt: skip


def tiny(objective: Joint | HiddenWords, **changes: Any) -> Run:
    joint = isinstance(objective, Joint)
    run = Run(
        recipe="tiny", model=MODEL, objective=objective, data=Data(pairs=8 * joint, texts=8 * (not joint)),
        optim=Optim(lr=3e-3, clip=0.5), schedule=Schedule(steps=4, warmup=1),
        parallel=Parallel(precision="fp32", threads=1), checkpoint=Checkpoint(every=2), log=Log(), seed=5,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def build(run: Run) -> Job:
    """What a recipe's ``build`` does, for records in memory."""
    torch.manual_seed(run.seed)
    model, kind = VLMo(run.model), "pair" if run.data.pairs else "text"
    settings: dict[str, Any] = {"words": WORDS, "grid": (4, 4), "branches": 2 * run.model.depth}
    objective: Any
    collate: Any
    if isinstance(run.objective, Joint):
        objective, collate = MaskedContrastMatching(model, run.objective.negatives), MatchCollate(**settings)
    else:
        objective, collate = MaskedLanguageModeling(model), MaskedCollate(**settings)
    objective.init_weights()
    source: Any = Records(kind)
    corpus = Corpus(sources={kind: [source]}, weights={kind: None}, tokenizer=None, hash="")
    load = Load(corpus=corpus, views={"pair": View(px=32, scale=(0.4, 1.0))}, seed=run.seed)
    stream = Stream(kind=kind, sources=[source], items=8, seed=run.seed)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")

    return Job(objective=objective, batches=Batches([stream], load, collate), data_hash="", export=export)


def work(run: Run, out: Path) -> None:
    train(run, build, out)


def result(world: int, run: Run, out: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rows of all steps, and the final weights."""
    with Ranks(world, work, run, out, log=out.with_suffix(".log")) as ranks:
        assert ranks.wait() == [0] * world, ranks.said
    return rows(out / "metrics.jsonl"), load_file(out / "final" / "model.safetensors")


def same(got: tuple[list[dict[str, Any]], dict[str, Tensor]], want: tuple[list[dict[str, Any]], dict[str, Tensor]]):
    for own, one in zip(got[0], want[0], strict=True):
        assert {k: v for k, v in own.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in one.items() if k != "seconds"}, rel=1e-4
        )
    assert all((got[1][key] - x).abs().max() < 5e-5 for key, x in want[1].items())


def far(run: Run, **changes: Any) -> Run:
    return dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, **changes))


def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    run = tiny(Joint())
    want = result(1, run, tmp_path / "one")
    assert want[0][-1]["loss"] < want[0][0]["loss"]
    others = {
        "sharded": run,
        "joined": far(run, micro=2),
        "detached": far(dataclasses.replace(run, objective=Joint(negatives="detached")), micro=2, shard="replicate"),
    }
    for name, other in others.items():
        same(result(2, other, tmp_path / name), want)


def test_frozen_weights_stay_in_one_process_and_in_two(tmp_path: Path) -> None:
    run = tiny(HiddenWords(), optim=Optim(lr=3e-3, clip=0.5, weight_decay=0.5, ema=0.9))
    want = result(1, run, tmp_path / "one")
    model = build(run).objective.model
    moved = {name for name, x in model.state_dict().items() if not torch.equal(want[1][name], x)}
    assert moved == {name for name in want[1] if reads_text(name)} - {"language.positions"}
    same(result(2, far(run, micro=2), tmp_path / "two"), want)


def test_the_stage_of_texts_resumes_to_the_bit(tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines, want = result(1, tiny(HiddenWords()), out)
    *_, last = sorted((out / "checkpoints").glob("step-*"))
    shutil.rmtree(last)  # as if the run had ended after its second step
    shutil.rmtree(out / "final")
    again, got = result(1, tiny(HiddenWords()), out)
    assert len(again) == len(lines) == 4 and "resumed" in out.with_suffix(".log").read_text()
    assert all(torch.equal(got[name], x) for name, x in want.items())
