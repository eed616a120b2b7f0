"""The study of transfer: what is held out stays unseen, and every arm costs as much."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from tests.benchmarks.test_benchmarks import FOLDER


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return pytest.importorskip("study_transfer")


@pytest.fixture
def raw(tmp_path):
    """The four sets, a few records each."""

    def rows(name, own):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in own))

    def lines(name, *own):
        path = tmp_path / "text-small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in own))

    rows("flickr8k-224/train.jsonl", [{"image": "a.jpg", "captions": ["A dog runs ."], "captions_zh": ["狗。"]}])
    rows("flickr8k-224/val.jsonl", [{"image": "b.jpg", "captions": ["A cat sits ."], "captions_zh": ["猫。"]}])
    points = [f"{n:04x}" for n in range(200)]
    named = [{"image": f"{p}.png", "codepoints": p, "names": {"en": f"sign {p}", "de": f"Zeichen {p}"}} for p in points]
    rows("emoji-noto/train.jsonl", named)
    lines("wikitext2_valid.txt", " ", " = Lobster = ")
    lines("sst2/train.tsv", "a fine film\t1")
    lines("cola/in_domain_train.tsv", "gj04\t1\t\tThe sailors rode the breeze.")
    for language, dog, cat in (
        ("en", "A man.", "A cat sits."),
        *((n, f"man {n}", f"cat {n}") for n in ("de", "fr", "cs")),
    ):
        lines(f"multi30k/train.{language}", dog, cat)
    return tmp_path


def test_what_is_held_out_is_not_seen_in_any_language(study, raw):
    found = study.tables(raw)
    seen = found["pretraining", "train"]
    texts = [row["text"].strip() for row in seen if "text" in row]
    assert texts == [
        "= Lobster =",
        "A man.",
        "man de",
        "man fr",
        "man cs",
        "a fine film",
        "The sailors rode the breeze.",
    ]
    pictures = {row["image"] for row in seen if "image" in row}
    held_out = {row["image"] for name in ("english", "emoji") for row in found[name, "val"]}
    assert pictures.isdisjoint(held_out)
    assert len(pictures | held_out) == 202 and 15 < len(held_out) < 80
    assert seen[0]["captions"] == ["A dog runs .", "狗。"]


def test_who_is_not_pre_trained_has_that_time_for_tuning(study, tmp_path):
    given = Namespace(out=tmp_path, budget=80.0, smoke=False)
    more = {}
    for name, task in study.TASKS.items():
        tuned, _ = study.tuning(given, "both", name, 0, 0.25)
        assert tuned.schedule.steps == task.steps and tuned.init
        own, _ = study.tuning(given, study.NEITHER, name, 0, 0.25)
        assert own.init is None
        more[name] = own.schedule.steps - task.steps
    run, _ = study.pretraining(given, "both", 0.5)
    assert 0.25 * sum(more.values()) == 0.5 * run.schedule.steps == 80
