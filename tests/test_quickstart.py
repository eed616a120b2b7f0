"""The quickstart, from nothing to its report: interrupted, continued, repeated, trained further; at a size of
seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from multiway import evaluation, pretrained, quickstart, recipes
from multiway.data import builtin, prepare
from multiway.engine.train import Trainer
from multiway.errors import ConfigError, Preempted
from multiway.report import chart, examples, page
from multiway.search.query import search
from multiway.search.store import Store

SCENES, HELD_OUT = 600, 60
VOID = {"meta", "img", "path", "br"}


class Page(HTMLParser):
    """A page as a test reads it: what it would load, its ids, its words; fails where a tag is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [named["id"]] if "id" in named else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def start(out: Path, steps: int | None) -> str:
    """Run the quickstart; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        quickstart.run(out, 0, steps)
    return printed.getvalue()


@pytest.fixture(scope="module")
def small():
    """Fewer scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SCENES", SCENES)
        patch.setattr(evaluation, "HELD_OUT", HELD_OUT)
        yield patch


@pytest.fixture(scope="module")
def story(small, tmp_path_factory):
    """A run that was asked to stop during its first step, and then started again."""
    out = tmp_path_factory.mktemp("runs") / "quick start"
    step = Trainer.step

    def asked(self, loaded):
        self.signals.asked = True
        return step(self, loaded)

    with small.context() as inner, pytest.raises(Preempted):
        inner.setattr(Trainer, "step", asked)
        start(out, 3)
    stopped = (out / "metrics.jsonl").read_text()
    assert not (out / "result.json").exists()
    printed = start(out, None)
    return SimpleNamespace(out=out, stopped=stopped, printed=printed)


@pytest.fixture(scope="module")
def shown(story):
    """What its report shows."""
    ready = pretrained.load(story.out / "final")
    book = quickstart.read_codebook(ready, story.out / "final")
    return SimpleNamespace(ready=ready, book=book, all=examples.collect(ready, book, HELD_OUT, 0))


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


# ------------------------------------------------------------------------------------------------------------- the run


def test_it_continues_where_it_stopped(story):
    rows = quickstart.read_metrics(story.out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert json.loads(story.stopped) == rows[0], "the first step was made once, before the stop"


def test_result_says_what_the_evaluation_said(story, shown):
    found = result(story.out)
    [line] = (story.out / "eval.jsonl").read_text().splitlines()
    evaluation = json.loads(line)
    assert {name: found[name] for name in ("retrieval", "zero_shot", "masked")} == {
        name: evaluation[name] for name in ("retrieval", "zero_shot", "masked")
    }
    assert found["retrieval"]["candidates"] == HELD_OUT
    assert set(found["retrieval"]["image_to_text"]) == set(found["retrieval"]["text_to_image"]) == {"r1", "r5", "r10"}
    assert found["zero_shot"]["chance"] == 0.1
    accuracies = ("image_code_accuracy", "text_token_accuracy", "image_code_trivial", "text_token_trivial")
    assert all(0 <= found["masked"][name] <= 1 for name in accuracies)
    assert found["steps"] == 3 and found["seed"] == 0 and found["threads"] == torch.get_num_threads()
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in quickstart.read_metrics(story.out)))
    assert found["parameters"] == sum(x.numel() for x in shown.ready.model.parameters())
    assert {"device", "commit"} <= set(found)


def test_the_promised_number_of_candidates():
    """What the issue and the documentation say; the tests take fewer."""
    assert "\nHELD_OUT = 1000\n" in Path(evaluation.__file__).read_text()


def test_shown_figures_are_those_of_the_evaluation(story, shown):
    found, everything = result(story.out), shown.all
    confusion = everything.confusion
    assert confusion.sum() == HELD_OUT
    assert confusion.trace() / HELD_OUT == pytest.approx(found["zero_shot"]["accuracy"])
    scores = everything.text @ everything.image.T
    first = page.ranked(scores)[:, 0] == np.arange(HELD_OUT)
    assert first.mean() == pytest.approx(found["retrieval"]["text_to_image"]["r1"])


def test_it_prints_figures_and_commands(story):
    found = result(story.out)
    assert f"{found['retrieval']['text_to_image']['r1']:8.1%}{1 / HELD_OUT:9.1%}" in story.printed
    assert str(story.out / "report.html") in story.printed
    for words in ("search", "quickstart --steps 6", "train beit3.quick --data.root DIR"):
        assert words in story.printed


def test_a_complete_run_is_only_shown_again(story, small):
    before = (story.out / "result.json").read_bytes()
    page_before = (story.out / "report.html").read_bytes()
    (story.out / "report.html").unlink()
    with small.context() as inner:
        inner.setattr(quickstart, "train", lambda *_, **__: pytest.fail("nothing is left to train"))
        start(story.out, None)
    assert (story.out / "result.json").read_bytes() == before
    assert (story.out / "report.html").read_bytes() == page_before, "the same numbers give the same page"


def test_it_trains_further_and_embeds_again(story, small, tmp_path):
    out = tmp_path / "further"
    shutil.copytree(story.out, out)
    start(out, 4)
    assert result(out)["steps"] == 4
    assert [row["step"] for row in quickstart.read_metrics(out)] == [1, 2, 3, 4]
    ready = pretrained.load(out / "final")
    assert Store.open(out / "store").fingerprint == ready.fingerprint
    assert Store.open(story.out / "store").fingerprint != ready.fingerprint
    with pytest.raises(ConfigError, match="made 4 steps already"):
        quickstart.run(out, 0, 3)


def test_another_run_is_not_taken_over(story, tmp_path):
    saved = json.loads((story.out / "run.json").read_text())
    saved["data"]["root"] = "photographs"
    (tmp_path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="photographs"):
        quickstart.run(tmp_path, 0, None)


def test_held_out_scenes_can_be_opened_and_found(story, shown):
    scenes, captions = shown.all.scenes, shown.all.captions
    lines = [json.loads(line) for line in (story.out / "scenes" / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == captions
    picture = np.asarray(Image.open(story.out / "scenes" / lines[7]["image"]))
    assert np.array_equal(picture.transpose(2, 0, 1), scenes.images[7])
    [hit] = search(story.out / "store", story.out / "scenes" / lines[7]["image"], k=1)
    assert hit.score == pytest.approx(1, abs=1e-5) and hit.captions == (captions[7],)
    hits = search(story.out / "store", captions[7], k=3)
    best = page.ranked(shown.all.text[7:8] @ shown.all.image.T)[0, :3]
    assert [Path(hit.path or "").stem for hit in hits] == [f"{i:06d}" for i in best]


# ---------------------------------------------------------------------------------------------------------- the threads


@pytest.mark.parametrize(
    ("cost", "best", "rounds"),
    [({1: 4, 2: 3, 4: 2, 8: 3}, 4, {1: 6, 2: 5, 4: 5, 8: 5}), ({1: 2, 2: 5, 4: 9, 8: 9}, 1, {1: 6, 2: 1, 4: 1, 8: 1})],
)
def test_the_fastest_number_of_threads_is_taken(monkeypatch, cost, best, rounds):
    """With a clock that runs as fast as the number of threads says; slow numbers are tried once."""
    state = SimpleNamespace(clock=0.0, threads=0, steps=dict.fromkeys(cost, 0))
    weight = torch.nn.Parameter(torch.ones(()))

    class Work(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def counts(self, batch):
            return {"one": 1}

        def forward(self, batch, counts):
            state.clock += cost[state.threads]
            state.steps[state.threads] += 1
            return SimpleNamespace(loss=self.weight * 2)

    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(state, "threads", count))
    monkeypatch.setattr(quickstart.time, "perf_counter", lambda: state.clock)
    drawn = itertools.repeat({})
    job = SimpleNamespace(objective=Work(), batches=None)
    assert quickstart.fastest(job, drawn, 8) == (best, cost[best])
    assert state.steps == rounds
    assert weight.grad is None, "the run starts as if nothing had been tried"
    assert quickstart.fastest(job, drawn, 1)[0] == 1


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_page_is_whole_and_loads_nothing(story, shown):
    text = (story.out / "report.html").read_text()
    read = Page(text)
    assert read.ids == ["pictures", "words", "search", "retrieval", "digits", "curves", "run", "next"]
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert all(link.startswith("data:image/jpeg;base64,") for link in read.loads)
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert read.tags.count("svg") == len(page.TERMS)
    assert read.tags.count("img") >= 5 * page.FILLED + page.WORDED + 5 * page.SEARCHED + page.FOUND
    for caption in shown.all.captions[: page.FILLED]:
        assert caption in read.words
    found = result(story.out)
    for share in (found["zero_shot"]["accuracy"], found["masked"]["text_token_trivial"], 10 / HELD_OUT):
        assert page.percent(share) in read.words


def test_hidden_patches_are_drawn_and_the_others_kept(shown):
    drawn, scenes = shown.all.pictures, shown.all.scenes
    over = drawn.hide.reshape(-1, 4, 4).repeat(16, 1).repeat(16, 2)[:, None]
    assert (drawn.hide.sum(1) == 4).all()
    for images in (drawn.alone, drawn.told, drawn.best):
        assert np.array_equal(np.where(over, 0, images), np.where(over, 0, scenes.images))
    codes = shown.book(torch.from_numpy(scenes.images))
    best = shown.book.decode(codes, (4, 4)).numpy()
    assert np.array_equal(np.where(over, drawn.best, 0), np.where(over, best, 0))
    for (row, column), objects in zip(drawn.box, scenes.objects):
        assert (row, column) in {(o.row, o.column) for o in objects}


def test_what_is_hidden_is_not_seen(shown):
    """Other patches under the cover, the same predictions; another caption, others with the caption alone."""
    scenes, captions = shown.all.scenes, shown.all.captions
    over = shown.all.pictures.hide.reshape(-1, 4, 4).repeat(16, 1).repeat(16, 2)[:, None]
    other = dataclasses.replace(scenes, images=np.where(over, 255 - scenes.images, scenes.images))
    before, after = shown.all.pictures, examples.fill_pictures(shown.ready, shown.book, other, captions)
    assert np.array_equal(np.where(over, before.alone, 0), np.where(over, after.alone, 0))
    assert np.array_equal(np.where(over, before.told, 0), np.where(over, after.told, 0))
    assert not np.array_equal(before.best, after.best)


def test_every_colour_and_digit_is_hidden(shown):
    words, captions = shown.all.words, shown.all.captions
    for line, caption in zip(words.words, captions):
        assert " ".join(word.text + word.tail for word in line) == caption
        assert [word.hidden for word in line] == [word.text in examples.TOLD for word in line]
    asked = [word for line in words.words for word in line if word.hidden]
    digits = [word for word in asked if word.text in builtin.DIGITS]
    assert len(digits) >= HELD_OUT
    for name, own in (("words", asked), ("digits", digits)):
        alone, told = words.right[name]
        assert alone == pytest.approx(np.mean([word.alone == word.text for word in own]))
        assert told == pytest.approx(np.mean([word.told == word.text for word in own]))


def test_words_are_told_by_the_picture_alone_when_it_is_there(shown):
    """Without the picture the prediction is a function of the text; with it, of both."""
    scenes, captions = shown.all.scenes, shown.all.captions
    other = dataclasses.replace(scenes, images=scenes.images[::-1].copy())
    after = examples.fill_words(shown.ready, other, captions)
    assert [[w.alone for w in line] for line in after.words] == [
        [w.alone for w in line] for line in shown.all.words.words
    ]


def test_a_word_is_marked_by_whether_it_is_right():
    word = examples.Word("three", ",", True, "three", "<b>")
    assert page.shown_word(word, word.alone) == '<span class="right">three</span>,'
    assert page.shown_word(word, word.told) == '<span class="wrong">&lt;b&gt;</span>,'
    assert page.shown_word(examples.Word("above"), "") == "above"


def test_the_right_result_is_added_with_its_place(shown):
    """The own picture of a query comes last: it is shown sixth, as the last of all."""
    text = np.zeros_like(shown.all.text)
    text[:, 0] = 1
    image = np.zeros_like(shown.all.image)
    image[:, 0] = np.linspace(0, 1, HELD_OUT)
    worst = dataclasses.replace(shown.all, text=text, image=image)
    read = Page(page.search(worst))
    assert f"{HELD_OUT} ✓" in read.words
    assert read.words.count("✓") == page.SEARCHED + page.FOUND


def test_covered_patches_show_nothing_of_the_picture():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    hide = np.zeros(16, dtype=bool)
    hide[[0, 5]] = True
    first, second = (page.covered(image, hide) for image in images)
    over = hide.reshape(4, 4).repeat(16, 0).repeat(16, 1)
    assert np.array_equal(first[:, over], second[:, over])
    assert np.array_equal(first[:, ~over], images[0][:, ~over])


def test_figures_are_written_as_people_read_them():
    assert page.percent(0.3384) == "33.8\u202f%"
    assert [page.duration(x) for x in (0.4, 59.4, 60, 185.2)] == ["0 s", "59 s", "1 min 0 s", "3 min 5 s"]
    assert "width:50.0%" in page.bar(0.5, 0.1) and "left:10.0%" in page.bar(0.5, 0.1)


def test_a_curve_is_smoothed_and_skips_what_is_not_finite():
    values = np.sin(np.arange(400) / 50)
    soft = chart.smooth(values)
    half = 400 // chart.SMOOTHING // 2
    assert soft[200] == pytest.approx(values[200 - half : 200 + half + 1].mean())
    assert np.allclose(chart.smooth(np.full(7, 3.0)), 3)
    assert chart.ticks(0.0, 4.6) == [0, 2, 4] and chart.ticks(3.9, 6.3) == [4, 5, 6]
    drawn = chart.curve([1, 2, 3], [1.0, math.nan, 3.0], level=2.0)
    assert "nan" not in drawn and 'class="level"' in drawn
    assert drawn == chart.curve([1, 3], [1.0, 3.0], level=2.0)
    assert chart.curve([1], [math.inf]) == "<p>no finite value</p>"


def test_ink_lies_in_the_cell_of_its_digit():
    scenes = builtin.retrieval_scenes(5)
    patches = builtin.ink_patches(scenes, 16).reshape(-1, 2, 2, 2, 2).any((2, 4))
    for found, objects in zip(patches, scenes.objects):
        assert {(o.row, o.column) for o in objects} == set(map(tuple, np.argwhere(found).tolist()))


def test_what_colours_and_places_alone_find():
    """Of three scenes two differ in a digit alone: each of them is right half of the time."""
    first, second = builtin.retrieval_scenes(2).objects
    other = (dataclasses.replace(first[0], digit=(first[0].digit + 1) % 10), *first[1:])
    scenes = SimpleNamespace(objects=[first, second, other])
    assert examples.without_digits(scenes) == pytest.approx(2 / 3)


def test_the_commit_is_that_of_this_tree():
    commit, changed = quickstart.source_version()
    if commit is None:
        pytest.skip("not a git checkout")
    assert len(commit) == 40 and isinstance(changed, bool)


@pytest.mark.parametrize(
    ("seconds", "asked", "precision", "steps"),
    [
        ({False: 0.1, True: 0.05}, None, "bf16", quickstart.MOST_STEPS),
        ({False: 0.1, True: 0.099}, None, "fp32", 1200),
        ({False: 9.0, True: 9.5}, None, "fp32", 1000),
        ({False: 0.1, True: 0.05}, 7, "bf16", 7),
    ],
)
def test_precision_and_steps_follow_from_the_probe(monkeypatch, seconds, asked, precision, steps):
    """bf16 only where it is clearly faster; as many steps as fit, never fewer than the recipe's unless asked."""
    monkeypatch.setattr(quickstart, "fastest", lambda job, drawn, most: (1, seconds[False]))
    monkeypatch.setattr(quickstart, "step_seconds", lambda job, batch, learn, bf16: seconds[bf16])
    monkeypatch.setattr(quickstart, "iterate", lambda batches, steps: (({}, []) for _ in steps))
    job = SimpleNamespace(batches=None, objective=SimpleNamespace(zero_grad=lambda set_to_none: None))
    found = quickstart.probe(recipes.recipe(quickstart.RECIPE)[0], job, 2, asked)
    assert (found.parallel.threads, found.parallel.precision, found.schedule.steps) == (1, precision, steps)
