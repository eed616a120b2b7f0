"""A run continues under the settings, the data and the weights it was started with, or it says what differs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from multiway import config
from multiway.engine import train as module
from multiway.engine.train import train
from multiway.errors import CheckpointError, ResumeError
from multiway.run import Checkpoint, Log, Optim, Parallel, Run
from tests.engine.tiny import Kind, Twist, build, rows, tensors, tiny


def changed(run: Run, name: str, value: Any) -> Run:
    """The run with one setting changed, by its dotted name."""
    part, _, key = name.partition(".")
    if key:
        value = dataclasses.replace(getattr(run, part), **{key: value})
    return dataclasses.replace(run, **{part: value})


def go(run: Run, out: Path, twist: Twist | None = None, **options: Any) -> dict[str, Any]:
    return train(run, partial(build, out=out, twist=twist or Twist()), out, **options)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run of three steps that has ended; not to be changed."""
    run, out = tiny(3, log=Log()), tmp_path_factory.mktemp("ended") / "run"
    go(run, out)
    return run, out


@pytest.fixture
def started(ended: tuple[Run, Path], tmp_path: Path) -> tuple[Run, Path]:
    """The same, to be continued."""
    return ended[0], Path(shutil.copytree(ended[1], tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.drop_path", 0.1, "model.drop_path: 0.2 -> 0.1"),
        ("objective", Kind("contrast"), "objective.name: 'masked' -> 'contrast'"),
        ("data.images", 4, "data.images: 8 -> 4"),
        ("data.more", {"other": 2.0}, "data.more.other: None -> 2.0"),
        ("optim.lr", 1e-4, "optim.lr: 0.003 -> 0.0001"),
        ("optim.betas", (0.9, 0.9), r"optim.betas: \[0.9, 0.98\] -> \[0.9, 0.9\]"),
        ("optim.ema", 0.5, "optim.ema: 0.9 -> 0.5"),
        ("schedule.steps", 5, "schedule.steps: 3 -> 5"),
        ("recipe", "other", "recipe: 'tiny' -> 'other'"),
        ("init", "folder", "init: None -> 'folder'"),
        ("seed", 6, "seed: 5 -> 6"),
    ],
)
def test_what_changes_the_run_is_refused_by_name(ended: Any, name: str, value: Any, told: str) -> None:
    run, out = ended
    before = (out / "run.json").read_text(), rows(out / "metrics.jsonl")
    with pytest.raises(ResumeError, match=rf"was started with other settings:\n  {told}\nStart in another") as caught:
        go(changed(run, name, value), out)
    assert caught.value.exit_code == 78
    assert ((out / "run.json").read_text(), rows(out / "metrics.jsonl")) == before


def test_all_differences_are_told_in_one_table_with_the_way_out(ended: Any) -> None:
    run, out = ended
    other = changed(changed(changed(run, "optim.lr", 1.0), "seed", 1), "checkpoint.keep", 5)
    with pytest.raises(ResumeError) as caught:
        go(other, out)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  optim.lr: 0.003 -> 1.0", "  seed: 5 -> 1"]
    assert lines[3].endswith("allow these with --change optim.lr,seed")


def test_what_changes_only_how_it_is_computed_is_free(started: Any) -> None:
    run, out = started
    other = dataclasses.replace(
        run,
        parallel=Parallel(precision="bf16", threads=1, micro=2, recompute=1, shard="replicate"),
        checkpoint=Checkpoint(every=1, keep=7),
        log=Log(evaluate=1),
        data=dataclasses.replace(run.data, workers=1, max_bad=0.5),
    )
    go(other, out)
    assert json.loads((out / "run.json").read_text())["checkpoint"] == {"every": 1, "keep": 7}


def test_a_change_that_is_named_is_made(started: Any) -> None:
    """And the optimiser's settings come from the run, not back from the checkpoint."""
    run, out = started
    longer = changed(changed(run, "schedule.steps", 5), "optim.weight_decay", 0.9)
    with pytest.raises(ResumeError, match="\n  schedule.steps: 3 -> 5\nStart"):
        go(longer, out, change=("optim.weight_decay",))
    go(longer, out, change=("optim.weight_decay", "schedule.steps"))
    go(longer, out)  # from now on these are its settings
    metrics = rows(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]

    same = out.with_name("same")
    go(run, same)
    go(changed(run, "schedule.steps", 5), same, change=("schedule.steps",))
    name = "model/model.mim_head.weight"
    decayed, usual = (tensors(max((folder / "checkpoints").iterdir()))[name].norm() for folder in (out, same))
    assert decayed < usual


def test_a_model_of_another_shape_does_not_fit_even_if_the_change_is_named(started: Any) -> None:
    run, out = started
    with pytest.raises(CheckpointError, match="model.mim_head"):
        go(changed(run, "model.codes", 9), out, change=("model.codes",))


def test_other_data_is_refused_unless_it_is_named(started: Any) -> None:
    run, out = started
    with pytest.raises(
        ResumeError, match="the data of .* changed: hash data when it was started, now other. .* --change data"
    ):
        go(run, out, Twist(data_hash="other"))
    go(run, out, Twist(data_hash="other"), change=("data",))


def test_another_environment_is_told_and_no_obstacle(
    started: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = started
    go(run, out)
    assert "the environment changed" not in capsys.readouterr().err
    here = module.environment
    monkeypatch.setattr(module, "environment", lambda process: {**here(process), "torch": "9.9", "threads": 64})
    go(run, out)
    told = " ".join(capsys.readouterr().err.split())
    assert "the environment changed, so the run is continued exactly but not bit by bit: torch 2." in told
    assert "-> 9.9, threads 1 -> 64" in told


def test_a_folder_in_use_is_not_resumed_if_that_is_not_wanted(ended: Any) -> None:
    run, out = ended
    with pytest.raises(ResumeError, match="already holds step 3"):
        go(run, out, resume=False)


def test_the_settings_are_kept_with_the_run(ended: Any) -> None:
    run, out = ended
    kept = json.loads((out / "run.json").read_text())
    assert kept["recipe"] == "tiny" and kept["optim"]["betas"] == [0.9, 0.98] and kept["model"]["dim"] == 32
    assert config.apply(run, kept) == run


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_the_averaged_weights_are_evaluated_and_exported(tmp_path: Path) -> None:
    run = tiny(4, log=Log(evaluate=2))
    figures = go(run, tmp_path)
    stored = tensors(tmp_path / "checkpoints" / "step-000000004")
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert final.keys() == {name.removeprefix("ema/model.") for name in stored if name.startswith("ema/")}
    for name, value in final.items():
        assert torch.equal(value, stored[f"ema/model.{name}"])
    name = "mim_head.weight"
    assert not torch.equal(final[name], stored[f"model/model.{name}"])
    evaluations = rows(tmp_path / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [2, 4]
    assert evaluations[-1] == {"step": 4, **figures}

    # Evaluating in between changes nothing.
    go(tiny(4, log=Log()), tmp_path / "without")
    assert rows(tmp_path / "without" / "metrics.jsonl") == rows(tmp_path / "metrics.jsonl")
    again = tensors(tmp_path / "without" / "checkpoints" / "step-000000004")
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_without_an_average_the_weights_themselves_are_exported(tmp_path: Path) -> None:
    run = tiny(2, log=Log(), optim=Optim(lr=1e-2))
    go(run, tmp_path)
    stored = tensors(tmp_path / "checkpoints" / "step-000000002")
    assert not any(name.startswith("ema/") for name in stored)
    for name, value in load_file(tmp_path / "final" / "model.safetensors").items():
        assert torch.equal(value, stored[f"model/model.{name}"])


def test_a_row_of_metrics_says_it_all(tmp_path: Path) -> None:
    go(tiny(5, log=Log(evaluate=2)), tmp_path)
    metrics = rows(tmp_path / "metrics.jsonl")
    terms = ["image", "pair_image", "pair_text", "text"]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    for row in metrics:
        given = [name for term in terms for name in (term, f"{term}/accuracy")]
        assert list(row) == ["step", "loss", *given, "lr", "grad_norm", "applied"]
        assert row["loss"] == pytest.approx(sum(row[term] for term in terms), rel=1e-5)
        assert 0 <= row["text/accuracy"] <= 1
    assert [row["lr"] for row in metrics][:3] == [0, 1.5e-3, 3e-3]


def test_a_setting_that_an_earlier_version_did_not_know_had_the_effect_of_its_default() -> None:
    run = Run(recipe="tiny", model=Optim(), objective=Optim())
    now = config.plain(run)
    before = json.loads(json.dumps(now))
    del before["optim"]["matrices"], before["schedule"]["shape"]
    assert config.differences(config.completed(before, run), now) == {}
    other = dataclasses.replace(run, optim=dataclasses.replace(run.optim, matrices="muon"))
    found = config.differences(config.completed(before, other), config.plain(other))
    assert found == {"optim.matrices": ("adamw", "muon")}
