"""Questions become batches: two texts one, two pictures two pairs, and every draw the question's own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from multiway.data.collate import Words
from multiway.data.examples import ExampleCollate, LoadExamples, Question, join
from multiway.data.image import View
from multiway.data.index import Index, build
from multiway.data.loader import Batches, Stream
from multiway.data.order import generator
from multiway.errors import ConfigError, DataError
from multiway.plan import make_plan
from tests.data.raw import png, write

OURS = Words(bos=0, eos=2, mask_id=99, first=4, stop=99, longest=12, window=64)
BERT = replace(OURS, bos=11, eos=12)
CLIP = replace(OURS, bos=90, eos=91, mask_id=-1)
SIGLIP = replace(CLIP, bos=-1)


def ids(count: int, first: int = 20) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


def question(number: int, words: int = 3, pictures: int = 0, answers: tuple[int, ...] = (1,)) -> Question:
    images = tuple(torch.full((3, 8, 8), 10 * number + k, dtype=torch.uint8) for k in range(pictures))
    rng = generator(0, "q", number)
    return Question(images=images, text=ids(words, 10 * number), answers=answers, record=number, rng=rng)


# ---------------------------------------------------------------------------------------------------------- two texts


@pytest.mark.parametrize(("words", "between"), [(OURS, [2, 2]), (BERT, [12]), (CLIP, []), (SIGLIP, [])])
def test_what_stands_between_two_texts(words, between):
    first, second = ids(3), ids(2, 40)
    joined = join((first, second), words)
    assert joined.tolist() == [*first, *between, *second] and joined.dtype == first.dtype
    assert join((first,), words).tolist() == first.tolist()


@pytest.mark.parametrize("words", [OURS, BERT, CLIP, SIGLIP])
@pytest.mark.parametrize("longest", [6, 7, 12, 13])
def test_texts_are_cut_fairly_to_the_longest(words, longest):
    words = replace(words, longest=longest)
    specials = len(words.framed(join((ids(0), ids(0)), words), "pair"))
    room = longest - specials
    for a in range(room + 4):
        for b in range(room + 4):
            joined = join((ids(a), ids(b, 60)), words)
            framed = words.framed(joined, "pair")
            first, second = [x for x in joined if 20 <= x < 60], [x for x in joined if 60 <= x < 90]
            assert len(framed) <= longest and framed.tolist()[-1] == words.eos
            assert first == ids(len(first)).tolist() and second == ids(len(second), 60).tolist()
            assert len(first) + len(second) == min(room, a + b)  # nothing is lost that had a place
            assert len(first) == a or len(first) >= len(second)  # who is cut is the longer one
            assert len(second) == b or len(second) + 1 >= len(first)


def test_one_text_is_cut_and_no_room_is_told():
    assert join((ids(30),), OURS).tolist() == ids(10).tolist()
    with pytest.raises(ConfigError, match="at most 5 ids have no room for 2: raise data.text_tokens"):
        join((ids(3), ids(3)), replace(OURS, longest=5))


# ------------------------------------------------------------------------------------------------------------ batches


def test_texts_alone():
    questions = [question(i, words) for i, words in enumerate((3, 5, 30))]
    batch = ExampleCollate(words=OURS)({"example": questions})
    texts = [OURS.framed(q.text, "pair") for q in questions]
    assert [len(t) for t in texts] == [5, 7, 12]  # the longest of a question, not of a document
    assert batch["text"].tolist() == np.concatenate(texts).tolist() and batch["text"].dtype == torch.int64
    assert batch["plan"].segments == make_plan({"text": {"text": [5, 7, 12]}}).segments
    assert batch["sample"].tolist() == [0, 1, 2]
    assert set(batch) == {"plan", "text", "sample"}


@pytest.mark.parametrize(("pictures", "leading"), [(1, 1), (2, 1), (2, 2)])
def test_pictures_are_laid_out_question_by_question(pictures, leading):
    questions = [question(i, 3 + i, pictures) for i in range(3)]
    collate = ExampleCollate(words=OURS, grid=(2, 3), pictures=pictures, leading=leading, branches=4)
    batch = collate({"example": questions})
    count = 3 * pictures
    assert batch["image"][:, 0, 0, 0].tolist() == [10 * i + k for i in range(3) for k in range(pictures)]
    texts = [OURS.framed(q.text, "pair") for q in questions for _ in range(pictures)]
    assert batch["text"].tolist() == np.concatenate(texts).tolist()
    expected = make_plan({"pair": {"image": [6 + leading] * count, "text": [len(t) for t in texts]}})
    plan = batch["plan"]
    assert plan.segments == expected.segments and torch.equal(plan.sample, expected.sample)
    assert torch.equal(plan.position, expected.position) and plan.samples == count
    assert batch["sample"].tolist() == np.repeat([0, 1, 2], pictures).tolist()
    assert batch["drop_path"].shape == (4, count) and batch["drop_path"].dtype == torch.float32


def test_draws_are_each_questions_own():
    collate = ExampleCollate(words=OURS, grid=(1, 1), pictures=2, branches=6)
    together = collate({"example": [question(i, pictures=2) for i in range(3)]})["drop_path"]
    for i in range(3):
        alone = collate({"example": [question(i, pictures=2)]})["drop_path"]
        assert torch.equal(alone, together[:, 2 * i : 2 * i + 2])
    assert len(together.unique()) == together.numel() and 0 <= together.min() <= together.max() < 1
    texts = ExampleCollate(words=OURS, branches=6)({"example": [question(0)]})["drop_path"]
    assert torch.equal(texts[:, 0], torch.from_numpy(generator(0, "q", 0).random(6, dtype=np.float32)))


def test_causal_texts():
    batch = ExampleCollate(words=CLIP, causal=True)({"example": [question(1)]})
    assert torch.equal(batch["plan"].groups[0].keep[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("targets", "key", "dtype", "shape"),
    [
        (lambda q: {"label": q.answers[0]}, "label", torch.int64, (2,)),
        (lambda q: {"value": 0.5}, "value", torch.float32, (2,)),
        (lambda q: {"score": np.eye(4)[q.answers[0]]}, "score", torch.float32, (2, 4)),
    ],
)
def test_targets_are_stacked(targets, key, dtype, shape):
    batch = ExampleCollate(words=OURS, targets=targets)({"example": [question(0), question(1, answers=(3,))]})
    assert batch[key].dtype == dtype and batch[key].shape == shape
    if key == "label":
        assert batch[key].tolist() == [1, 3]


def test_all_questions_have_an_answer_or_none_has():
    def targets(q: Question) -> dict[str, int]:
        return {"label": q.answers[0]} if q.answers else {}

    collate = ExampleCollate(words=OURS, targets=targets)
    assert "label" not in collate({"example": [question(0, answers=()), question(1, answers=())]})
    with pytest.raises(DataError, match="1 of 2 questions have no answer"):
        collate({"example": [question(0), question(1, answers=())]})


def test_a_question_with_another_number_of_pictures_is_refused():
    collate = ExampleCollate(words=OURS, grid=(1, 1), pictures=2)
    with pytest.raises(ConfigError, match="example 7 has 1 pictures, but the model reads 2 of each"):
        collate({"example": [question(7, pictures=1)]})


# ---------------------------------------------------------------------------------------------------- from the index


@pytest.fixture(scope="module")
def statements(tmp_path_factory) -> Index:
    rows = [{"image": f"{i}.png", "image2": f"{i + 1}.png", "text": f"word {i}", "label": i > 2} for i in range(5)]
    root = tmp_path_factory.mktemp("raw")
    write(root, {"set.jsonl": "\n".join(map(json.dumps, rows))} | {f"{i}.png": png(i) for i in range(6)})
    return build(root, root / "out", task="nlvr2", vocab=64, progress=False)


def load_of(index: Index, view: View | None) -> LoadExamples:
    t = index.tokenizer
    words = Words(bos=t.bos, eos=t.eos, mask_id=t.hide, first=t.words[0], stop=t.words[1], longest=16, window=16)
    return LoadExamples(sources=index.sources, view=view, seed=3, words=words)


def test_what_is_loaded_is_a_function_of_seed_epoch_and_record(statements):
    load = load_of(statements, View(px=8, scale=(0.3, 1.0), flip=0.5))
    source = statements.sources[0]
    for record in range(5):
        first, again, later = (
            load("example", 0, record, 0),
            load("example", 0, record, 0),
            load("example", 0, record, 1),
        )
        assert first.text.tolist() == source.texts(record)[0].tolist()
        assert (first.record, first.answers) == (record, source.answers(record))
        assert [x.shape for x in first.images] == [(3, 8, 8)] * 2
        assert all(torch.equal(x, y) for x, y in zip(first.images, again.images, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(first.images, later.images, strict=True))
        assert first.rng.random() == again.rng.random() != later.rng.random()
    whole = load_of(statements, View(px=8, scale=None, flip=0.0))("example", 0, 2, 0)
    other = load_of(statements, View(px=8, scale=None, flip=0.0))("example", 0, 3, 0)
    assert torch.equal(whole.images[1], other.images[0]) and not torch.equal(whole.images[0], whole.images[1])


def test_without_a_view_no_picture_is_read(statements, monkeypatch):
    monkeypatch.setattr("multiway.data.indexed.decode", None)
    assert load_of(statements, None)("example", 0, 1, 0).images == ()


def test_the_loader_delivers_examples(statements):
    load = load_of(statements, View(px=8, scale=None, flip=0.0))
    collate = ExampleCollate(
        words=load.words, grid=(2, 2), pictures=2, branches=2, targets=lambda q: {"label": q.answers[0]}
    )
    batches = Batches([Stream(kind="example", sources=statements.sources, items=5, seed=0)], load, collate)
    batch, faults = batches.batch(0)
    records = batch["sample"][::2].tolist()
    assert faults == [] and sorted(records) == list(range(5))
    assert batch["label"].tolist() == [statements.sources[0].answers(i)[0] for i in records]
    assert batch["image"].shape == (10, 3, 8, 8) and batch["image"].is_contiguous()
    halves = [batches.batch(0, part, 5)[0] for part in range(5)]
    for key in ("image", "text", "label", "sample"):
        assert torch.equal(torch.cat([half[key] for half in halves]), batch[key])
    assert torch.equal(torch.cat([half["drop_path"] for half in halves], dim=1), batch["drop_path"])


def test_a_picture_that_is_gone_is_a_fault_with_its_example(statements, tmp_path):
    rows = [{"id": f"q{i}", "image": f"{i}.png", "text": f"word {i}", "label": "True"} for i in range(4)]
    root = write(tmp_path, {"set.jsonl": "\n".join(map(json.dumps, rows))} | {f"{i}.png": png(i) for i in range(4)})
    index = build(root, tmp_path / "out", task="nlvr2", vocab=64, progress=False)
    (root / "2.png").unlink()
    (root / "1.png").write_bytes(png(9))
    load = load_of(index, View(px=8, scale=None, flip=0.0))
    collate = ExampleCollate(words=load.words, grid=(2, 2), pictures=1)
    batches = Batches([Stream(kind="example", sources=index.sources, items=4, seed=0)], load, collate)
    batch, faults = batches.batch(0)
    assert {(fault["key"], fault["reason"]) for fault in faults} == {("q1", "changed"), ("q2", "missing")}
    assert set(batch["sample"].tolist()) == {0, 3}
