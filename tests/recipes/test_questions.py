"""Answering from the recipe to the scorer's file: published figures, two steps, an evaluation, the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from multiway import answers, config, pretrained
from multiway.cli import main
from multiway.data import questions as data_questions
from multiway.engine.train import train
from multiway.errors import ConfigError, DataError
from multiway.recipes import beit3, clip, questions, siglip
from multiway.run import Run
from tests import tiny

SMALL = [
    "--model.dim=32", "--model.heads=2", "--model.depth=2", "--data.examples=6", "--schedule.steps=2",
    "--schedule.warmup=1", "--parallel.threads=1",
]  # fmt: skip
BEIT3 = [*SMALL, "--model.hidden=32", "--model.image_px=32"]
TEXTS = ["a cat", "two dogs", "a red kite", "the sea", "a tall tree", "nothing"]


def two_steps(run: Run, build: Callable, out: Path, *options: str) -> dict:
    train(config.override(run, list(options)), partial(build, out=out), out)
    return json.loads((out / "eval.jsonl").read_text().splitlines()[-1])


def table(folder: Path, split: str, rows: list[dict]) -> None:
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    return [path.relative_to(tmp_path).as_posix() for path in tiny.write_pictures(tmp_path / "pictures", 8, seed=1)]


@pytest.fixture
def asked(tmp_path: Path, pictures: list[str]) -> Path:
    """Questions with answers of several people."""
    for split, first in (("train", 0), ("val", 2)):
        rows = [
            {"id": str(first + i), "image": pictures[i], "text": f"is it {text}?", "answers": ["Yes", "yes.", "yes"]}
            for i, text in enumerate(TEXTS)
        ]
        rows[1]["answers"] = ["a cat", "cat", "cat"]
        table(tmp_path, split, rows)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "parameters", "lr", "decay", "rate", "px"),
    [("base", 222_117_120, 3e-5, 1.0, 0.1, 480), ("large", 674_812_928, 2e-5, 1.0, 0.15, 480)],
)
def test_published_figures_of_question_answering(name, parameters, lr, decay, rate, px) -> None:
    """masked.md 6.3, 6.5; encoder and embeddings of 6.1, more positions, no final norm, pooler and head."""
    run = getattr(beit3, f"{name}_vqa")()
    with torch.device("meta"):
        model = beit3.BEiT3(dataclasses.replace(run.model, answers=3129))
    dim = run.model.dim
    head = 2 * dim + dim * dim + dim + 2 * dim * dim + 2 * dim + 4 * dim + 2 * dim * 3129 + 3129
    assert head == sum(p.numel() for part in (model.pooler, model.answer_head) for p in part.parameters())
    encoder = {"base": 220_987_392, "large": 672_702_464}[name]
    assert sum(p.numel() for p in model.parameters()) == encoder + (900 - 196) * dim - 4 * dim + head
    assert (run.model.image_px, run.model.drop_path, run.data.examples) == (px, rate, 128)
    assert (run.optim.lr, run.optim.layer_decay, run.optim.weight_decay, run.optim.head) == (lr, decay, 0.01, 20)
    assert run.schedule.steps == 10 * run.schedule.warmup and run.objective.augment and run.objective.least == 9


@pytest.mark.parametrize(("name", "lr", "decay"), [("base", 7e-4, 0.65), ("large", 3e-4, 0.85)])
def test_published_figures_of_two_pictures(name, lr, decay) -> None:
    run = getattr(beit3, f"{name}_nlvr2")()
    assert (run.model.pictures, run.model.image_px, run.model.drop_path, run.data.examples) == (2, 224, 0.2, 256)
    assert (run.optim.lr, run.optim.layer_decay, run.optim.weight_decay) == (lr, decay, 0.2)
    assert run.schedule.steps == 4 * run.schedule.warmup and not run.objective.augment


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "entailment", "text_classification"])
def test_without_data_it_answers_about_scenes(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_questions, "SCENES", 20)
    monkeypatch.setattr(data_questions, "HELD_OUT_SCENES", 10)
    figures = two_steps(getattr(beit3, f"quick_{task}")(), beit3.build, tmp_path, *SMALL, "--model.hidden=32")
    [found] = [own for name, own in figures.items() if name == task]
    assert 0 <= found["accuracy"] <= 1 and found["floor"]["accuracy"] > 0
    name = "text_classification" if task == "text" else task
    assert answers.evaluate(str(tmp_path), name) == found


def test_a_head_starts_on_a_pre_trained_model(asked: Path, tmp_path: Path) -> None:
    """Nothing but the head is new, and the model's own tokenizer is kept."""
    made = tiny.pretrained(codes=0, contrast=False)
    made.save_pretrained(tmp_path / "first")
    shape = made.model.config
    same = [
        f"--model.{name}={getattr(shape, name)}" for name in ("dim", "depth", "heads", "hidden", "image_px", "vocab")
    ]
    same += [f"--model.text_positions={shape.text_positions}", f"--model.patch={shape.patch}"]
    two_steps(
        beit3.quick_vqa(), beit3.build, tmp_path / "out", *same, *SMALL[3:], f"--init={tmp_path / 'first'}",
        f"--data.root={asked}", "--optim.lr=0", "--optim.weight_decay=0", "--data.text_tokens=16",
    )  # fmt: skip
    before, after = (pretrained.load(tmp_path / name) for name in ("first", "out"))
    own = after.model.state_dict()
    assert {n.partition(".")[0] for n in own.keys() - before.model.state_dict().keys()} == {"pooler", "answer_head"}
    assert all(torch.equal(own[n], x) for n, x in before.model.state_dict().items() if n in own)
    assert after.tokenizer.hash == before.tokenizer.hash
    assert after.preprocessor.labels == ["yes", "cat"] and after.preprocessor.task == "vqa"


def test_it_writes_what_the_scorer_reads(asked: Path, tmp_path: Path, capsys) -> None:
    two_steps(beit3.quick_vqa(), beit3.build, tmp_path / "out", *BEIT3, f"--data.root={asked}")
    capsys.readouterr()
    file = tmp_path / "answers.json"
    main(f"evaluate {tmp_path / 'out'} --task vqa --data {asked} --predictions {file}".split())
    figures = json.loads(capsys.readouterr().out)
    rows = json.loads(file.read_text())
    assert [row["question_id"] for row in rows] == [2, 3, 4, 5, 6, 7]
    assert {row["answer"] for row in rows} <= {"yes", "cat"}
    right = sum(row["answer"] == ("cat" if row["question_id"] == 3 else "yes") for row in rows)
    assert figures["examples"] == 6 and figures["accuracy"] == pytest.approx(right / 6)
    main(["answer", str(tmp_path / "out"), "is it a cat?", str(asked / "pictures" / "000.png")])
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in lines) == ["cat", "yes"]


def test_two_pictures_from_a_users_table(tmp_path: Path, pictures: list[str]) -> None:
    for split in ("train", "val"):
        rows = [
            {"id": f"{split}-{i}", "images": [pictures[i], pictures[i + 1]], "text": text, "label": str(i % 2 == 0)}
            for i, text in enumerate(TEXTS)
        ]
        table(tmp_path, split, rows)
    figures = two_steps(beit3.quick_nlvr2(), beit3.build, tmp_path / "out", *BEIT3, f"--data.root={tmp_path}")
    assert figures["nlvr2"]["examples"] == 6 and figures["nlvr2"]["floor"]["accuracy"] == 0.5
    model = pretrained.load(tmp_path / "out")
    assert model.model.config.pictures == 2 and model.preprocessor.labels == ["False", "True"]
    first, second = (tmp_path / name for name in pictures[:2])
    found = answers.answer(model, ["a cat", "the sea"], [[first, second], [second, first]])
    assert found.shape == (2, 2) and torch.allclose(found.sum(1), torch.ones(2))
    with pytest.raises(ConfigError, match="reads 2 pictures"):
        answers.answer(model, ["a cat"], [[first]])


@pytest.mark.parametrize("system", [beit3, clip, siglip], ids=lambda module: module.__name__.rpartition(".")[2])
def test_texts_alone(system, tmp_path: Path) -> None:
    """One text or two, by every encoder of texts; a table of GLUE's Matthews correlation."""
    for split in ("train", "dev"):
        rows = [f"x\t{i % 2}\t\t{text}\n" for i, text in enumerate(TEXTS)]
        (tmp_path / f"{split}.tsv").write_text("".join(rows))
    extra = {beit3: BEIT3, siglip: [*SMALL, "--model.hidden=32"]}.get(
        system, [o.replace("model.", "model.text_") for o in SMALL[:3]] + SMALL[3:] + ["--model.text_hidden=32"]
    )
    figures = two_steps(
        system.quick_text_classification(), system.build, tmp_path / "out", *extra, f"--data.root={tmp_path}",
        "--objective.data_set=CoLA",
    )["text_classification"]  # fmt: skip
    assert -1 <= figures["matthews"] <= 1 and figures["examples"] == 6


def test_numbers(tmp_path: Path) -> None:
    """STS-B: how alike two texts are."""
    for split in ("train", "val"):
        rows = [{"text": text, "text2": TEXTS[-1 - i], "label": i / 2} for i, text in enumerate(TEXTS)]
        table(tmp_path, split, rows)
    options = [*BEIT3, f"--data.root={tmp_path}", "--objective.data_set=STS-B"]
    figures = two_steps(beit3.quick_text_classification(), beit3.build, tmp_path / "out", *options)[
        "text_classification"
    ]
    assert set(figures) >= {"pearson", "spearman"} and figures["examples"] == 6
    model = pretrained.load(tmp_path / "out")
    assert model.preprocessor.labels == [answers.VALUE]
    assert answers.answer(model, [("a cat", "two dogs")]).shape == (1, 1)


@pytest.mark.parametrize(
    ("make", "build", "options", "message"),
    [
        (
            clip.quick_text_classification,
            clip.build,
            ["--objective.task=nlvr2"],
            "nlvr2 needs a model that encodes image with text",
        ),
        (
            siglip.quick_text_classification,
            siglip.build,
            ["--objective.task=vqa"],
            "vqa needs a model that encodes image with text",
        ),
    ],
)
def test_wrong_pairings_fail_when_the_run_is_built(make, build, options, message, tmp_path: Path) -> None:
    """Before any data is read: the root is not even there."""
    run = config.override(make(), [*options, f"--data.root={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=message):
        build(run, tmp_path)


def test_what_does_not_fit_is_told(asked: Path, tmp_path: Path) -> None:
    run = config.override(beit3.quick_text_classification(), [*BEIT3, f"--data.root={asked}"])
    with pytest.raises(DataError, match="3 answers, expected one"):
        beit3.build(run, tmp_path / "a")
    run = config.override(beit3.quick_vqa(), [*BEIT3, f"--data.root={asked}", "--model.answers=7"])
    with pytest.raises(ConfigError, match="2 answers, model.answers is 7"):
        beit3.build(run, tmp_path / "b")
    run = config.override(beit3.quick_vqa(), [*BEIT3, f"--data.root={asked}", "--objective.least=9"])
    with pytest.raises(DataError, match="most frequent"):
        beit3.build(run, tmp_path / "c")
    run = config.override(beit3.quick_vqa(), [*BEIT3, f"--data.root={asked}"])
    with pytest.raises(ConfigError, match="one root"):
        beit3.build(dataclasses.replace(run, data=dataclasses.replace(run.data, more={"x": 1.0})), tmp_path / "d")


def test_rehearsal(tmp_path: Path) -> None:
    """`multiway plan` of every kind of question."""
    from multiway.rehearsal import Stage

    for run in (beit3.quick_vqa(), beit3.quick_nlvr2(), beit3.quick_text_classification()):
        trace = Stage(run, beit3.assemble, {}).micro({"example": 2}, 0)
        assert trace.flops > 0


def test_start_from_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    tiny.pretrained(codes=0, contrast=False).save_pretrained(tmp_path / "first")
    with torch.device("meta"):
        other = clip.CLIP(clip.quick_text_classification().model)
    with pytest.raises(ConfigError, match="BEiT3"):
        questions.start_from(other, str(tmp_path / "first"))
