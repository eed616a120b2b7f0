"""From folders to samples with classes, and what a corpus needs only where it is asked for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multiway.data import prepare
from multiway.data.augment import RandAugment
from multiway.data.image import View
from multiway.data.order import generator
from multiway.data.prepare import Corpus, Load, open_corpus, require_labels, scene_corpus, stored_views
from multiway.errors import ConfigError, DataError
from multiway.run import Data
from tests.data.raw import png, write

CLASSES = {f"{name}/{i}.png": png(10 * k + i) for k, name in enumerate(("ant", "bee", "cow")) for i in range(2)}
VIEW = View(px=8)


def opened(root: Path, tmp_path: Path, **fields: Any) -> Corpus:
    return open_corpus(Data(root=str(root), vocab=64, **fields), tmp_path / "index")


def loaded(corpus: Corpus, kind: str, record: int) -> Any:
    return Load(corpus=corpus, views={"image": VIEW, "pair": VIEW}, seed=0)(kind, 0, record, 0)


def test_the_folder_is_the_class_and_no_text_is_needed(tmp_path: Path) -> None:
    corpus = opened(write(tmp_path / "raw", CLASSES), tmp_path)
    require_labels(corpus)
    assert corpus.labels == ("ant", "bee", "cow") and corpus.tokenizer is None
    source = corpus.sources["image"][0]
    for record in range(6):
        sample = loaded(corpus, "image", record)
        assert corpus.labels[sample.label] == source.key(record).split("/")[0] and sample.text is None


def test_words_are_missed_where_they_are_needed(tmp_path: Path) -> None:
    data = Data(root=str(write(tmp_path / "raw", CLASSES)))
    with pytest.raises(ConfigError, match="raw has no texts and data.tokenizer names none"):
        open_corpus(data, tmp_path / "index").words(data)


def test_pictures_with_captions_have_their_class_too(tmp_path: Path) -> None:
    captions = {name.replace("png", "txt"): f"picture {name}" for name in CLASSES}
    corpus = opened(write(tmp_path / "raw", {**CLASSES, **captions}), tmp_path)
    require_labels(corpus)
    sample = loaded(corpus, "pair", 5)
    assert corpus.labels[sample.label] == "cow" and len(sample.text)
    assert loaded(corpus, "image", 5).label == sample.label  # the same pictures, alone
    assert loaded(corpus, "text", 0).label is None


@pytest.mark.parametrize("captions", [0, 3], ids=["images", "pairs"])
def test_pictures_without_a_class_are_named(tmp_path: Path, captions: int) -> None:
    rows = [{"image": name, "label": name.split("/")[0]} for name in CLASSES]
    for row in rows[1:5]:
        del row["label"]
    for row in rows[:captions]:
        row["text"] = "a caption"
    table = "\n".join(map(json.dumps, rows))
    corpus = opened(write(tmp_path / "raw", {**CLASSES, "table.jsonl": table}), tmp_path)
    assert corpus.labels == ("ant", "cow")
    with pytest.raises(DataError, match="4 of 6 pictures have no class.*label column") as error:
        require_labels(corpus)
    named = str(error.value).splitlines()[1:]
    assert len(named) == 3 and all("table.jsonl" in line or ".png" in line for line in named)


def test_scenes_and_empty_corpora_have_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SCENES", 8)
    corpus = scene_corpus(0)
    assert corpus.labels == () and loaded(corpus, "pair", 0).label is None
    with pytest.raises(DataError, match=r"8 of 8 pictures have no class.*\n  scene 0"):
        require_labels(corpus)
    with pytest.raises(DataError, match="0 of 0 pictures"):
        require_labels(dataclasses.replace(corpus, sources=dict.fromkeys(prepare.KINDS, ())))


def test_several_roots_have_the_same_classes_or_none_that_can_be_used(tmp_path: Path) -> None:
    first, same = write(tmp_path / "first", CLASSES), write(tmp_path / "same", CLASSES)
    fewer = write(tmp_path / "fewer", {name: x for name, x in CLASSES.items() if "bee" not in name})
    plain = write(tmp_path / "plain", {"a.png": png(99)})
    assert opened(first, tmp_path, more={str(same): 1.0}).labels == ("ant", "bee", "cow")
    corpus = opened(first, tmp_path, more={str(fewer): 1.0})  # numbers mean other classes there
    assert len(corpus.sources["image"]) == 2
    with pytest.raises(ConfigError, match="first has 3 classes and .*fewer has 2.*not in both: bee"):
        require_labels(corpus)
    unlabelled = opened(first, tmp_path, more={str(plain): 1.0})
    assert unlabelled.labels == ("ant", "bee", "cow")
    with pytest.raises(DataError, match=r"1 of 7 pictures have no class.*\n  a.png"):
        require_labels(unlabelled)


def test_what_is_loaded_is_a_function_of_seed_epoch_and_record(tmp_path: Path) -> None:
    corpus = opened(write(tmp_path / "raw", CLASSES), tmp_path)
    view = View(px=(8, 12), scale=(0.3, 1.0), flip=0.5, augment=RandAugment())
    load = Load(corpus=corpus, views={"image": view}, seed=3)
    one, two, other = load("image", 0, 4, 1), load("image", 0, 4, 1), load("image", 0, 4, 2)
    assert one.image is not None and one.image.shape == (3, 8, 12) and torch.equal(one.image, two.image)
    assert not torch.equal(one.image, other.image)
    assert one.rng.random() == two.rng.random() != other.rng.random()


def test_views_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    corpus = opened(write(tmp_path / "raw", CLASSES), tmp_path)

    def store(view: View) -> Any:
        codes = torch.zeros(0, 4, dtype=torch.int64)
        return stored_views(
            corpus, lambda image: codes.new_zeros(len(image), 4), "zeros", {"image": view}, each=2, seed=0,
            out=tmp_path, track=iter,
        )  # fmt: skip

    for fields in ({"share": 0.9}, {"augment": RandAugment()}, {"interpolation": "bilinear"}):
        with pytest.raises(ConfigError, match="stored views are plain bicubic crops: set objective.views to 0"):
            store(View(px=8, **fields))
    stored, _ = store(View(px=(8, 16), scale=(0.5, 1.0), jitter=0.4))
    assert list(stored) == ["image"]
    image, code = stored["image"][0].draw(torch.zeros(3, 12, 20, dtype=torch.uint8), 0, (8, 16), generator(0))
    assert image.shape == (3, 8, 16) and code.shape == (4,)
    assert store(View(px=(8, 16), scale=(0.5, 1.0)))[1] == store(View(px=(8, 16), scale=(0.5, 1.0)))[1]


def test_some_pairs_get_the_text_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SCENES", 200)
    corpus = scene_corpus(0)
    plain = Load(corpus=corpus, views={"image": VIEW, "pair": VIEW}, seed=3)
    mixed = dataclasses.replace(plain, mismatch=0.3)
    wrong = []
    for record in range(100):
        one, other, again = plain("pair", 1, record, 2), mixed("pair", 1, record, 2), mixed("pair", 1, record, 2)
        own = [text.tolist() for text in corpus.sources["pair"][1].texts(record)]
        assert one.match and torch.equal(one.image, other.image) and np.array_equal(again.text, other.text)
        assert other.match == (other.text.tolist() in own) == again.match
        assert not other.match or np.array_equal(one.text, other.text)
        wrong.append(not other.match)
    assert 0.15 < np.mean(wrong) < 0.45  # standard error .046
    assert mixed("image", 1, 0, 0).match and mixed("text", 1, 0, 0).match
    same = [mixed(kind, 1, 4, 0).rng.random() for kind in ("image", "text")]
    assert same == [plain(kind, 1, 4, 0).rng.random() for kind in ("image", "text")]


def test_where_all_texts_are_alike_all_pairs_match(tmp_path: Path) -> None:
    captions = {name.replace("png", "txt"): "the same" for name in CLASSES}
    corpus = opened(write(tmp_path / "raw", {**CLASSES, **captions}), tmp_path)
    load = Load(corpus=corpus, views={"pair": VIEW}, seed=0, mismatch=0.9)
    assert all(load("pair", 0, record, 0).match for record in range(6))
