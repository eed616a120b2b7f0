"""An index holds every good record as it was measured, is verified, and reads nothing else."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from multiway.data.columns import Table
from multiway.data.image import Limits, decode
from multiway.data.index import Index, build, check, describe, overlap
from multiway.data.text import TextTokenizer, sanitize
from multiway.errors import ConfigError, DataError, MissingInputError, RecordError, WriteError
from tests.data.raw import encode, noise, png, samples, shard, write

FLICKR = Path(__file__).parents[2] / "../shared/data/flickr8k-224"
QUIET = {"progress": False, "vocab": 128}


@pytest.fixture
def root(tmp_path) -> Path:
    """A table with pictures, pairs and texts, one picture of them wide."""
    rows = [
        {"image": "a.png", "captions": ["a  red dog", "the dog"], "label": "10"},
        {"image": "b.jpg", "label": "9"},
        {"text": "one document about dogs"},
        {"image": "c.png", "text": "a blue cat"},
        {"text": "another document"},
        {"image": "a.png", "text": "the same dog again"},
    ]
    files = {"set.jsonl": "\n".join(map(json.dumps, rows)), "a.png": png(0), "c.png": png(1)}
    return write(tmp_path / "raw", files | {"b.jpg": encode(noise(64, 48), "JPEG")})


def test_everything_good_is_in_the_index(root, tmp_path):
    made = build(root, tmp_path / "out", **QUIET)
    pairs, images, texts = made.sources
    assert [(s.name, s.kind, len(s)) for s in made.sources] == [
        ("set", "pair", 3),
        ("set", "image", 1),
        ("set", "text", 1),
    ]
    assert made.manifest["report"]["seen"] == made.manifest["report"]["indexed"] == 6
    assert [pairs.key(i) for i in range(3)] == ["a.png", "c.png", "a.png"]
    assert pairs.strings(0) == ["a red dog", "the dog"] and pairs.strings(2) == ["the same dog again"]
    tokenizer = made.tokenizer
    for i in range(3):
        assert [x.tolist() for x in pairs.texts(i)] == [tokenizer.ids(t).tolist() for t in pairs.strings(i)]
    assert pairs.token_lengths.tolist() == [len(x) for i in range(3) for x in pairs.texts(i)]
    assert torch.equal(pairs.image(1), decode(png(1)).image)
    assert images.size(0) == (48, 64) and images.image(0, px=24).shape == (3, 24, 32)
    assert pairs.image_hash(0) == pairs.image_hash(2) != pairs.image_hash(1)
    assert made.labels == ("9", "10")  # numbers by value
    assert (pairs.label(0), pairs.label(1), images.label(0), texts.label(0)) == (1, None, 0, None)
    assert images.texts(0) == [] and images.token_lengths.tolist() == []
    assert pairs.blocks is None
    words = [*tokenizer.ids("one document about dogs"), tokenizer.eos, *tokenizer.ids("another document")]
    assert texts.window(0).tolist() == words and texts.window(0).dtype == np.int32


@pytest.mark.parametrize("window", [3, 7, 12, 512])
def test_windows_cut_the_documents_without_a_gap(tmp_path, window):
    documents = [" ".join(f"word{j}" for j in range(i, 2 * i + 1)) for i in range(12)]
    path = write(tmp_path, {"t.txt": "\n\n".join(documents)}) / "t.txt"
    made = build(path, tmp_path / "out", window=window, **QUIET)
    source = made.sources[0]
    stream = np.concatenate([[*made.tokenizer.ids(d), made.tokenizer.eos] for d in documents])[:-1]
    windows = [source.window(i) for i in range(len(source))]
    assert np.concatenate(windows).tolist() == stream.tolist()
    assert {len(w) for w in windows[:-1]} <= {window - 2} and 1 <= len(windows[-1]) <= window - 2
    assert source.token_lengths.tolist() == [len(w) for w in windows]
    for beyond in (len(source), -1):
        with pytest.raises(IndexError, match="window"):
            source.window(beyond)


def test_long_documents_are_not_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr("multiway.data.scan.MAX_CHARS", 50)
    text = " ".join(f"w{i}" for i in range(60))
    made = build(write(tmp_path, {"t.txt": text}) / "t.txt", tmp_path / "out", **QUIET)
    assert made.manifest["report"]["seen"] == 1 and made.manifest["report"]["notes"] == {}
    assert made.sources[0].strings(0)[0].replace(" ", "") == text.replace(" ", "")


def test_a_tar_is_read_by_offset_and_knows_its_shards(tmp_path):
    shard(tmp_path / "a-0.tar", samples(3))
    shard(tmp_path / "a-1.tar", samples(2, first=3))
    source = build(tmp_path, tmp_path / "out", **QUIET).sources[0]
    assert source.blocks == [3, 2]
    for i in range(5):
        assert source.key(i) == f"{i:03d}" and source.strings(i) == [f"picture {i}"]
        assert torch.equal(source.image(i), decode(png(i)).image)


def test_a_given_tokenizer_is_used(root, tmp_path):
    tokenizer = TextTokenizer.train(["some other words about a dog"], 40, "bpe")
    made = build(root, tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert made.tokenizer.hash == made.manifest["tokenizer"] == tokenizer.hash
    assert made.sources[0].texts(0)[0].tolist() == tokenizer.ids("a red dog").tolist()


def test_the_same_data_give_the_same_index_anywhere_and_with_workers(root, tmp_path):
    first = build(root, tmp_path / "one", **QUIET)
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    (moved / "not-read.txt").write_text("x")
    second = build(moved, tmp_path / "two", workers=2, **QUIET)
    assert first.hash == second.hash and first.manifest["roots"] != second.manifest["roots"]
    (moved / "c.png").write_bytes(png(9))  # D21: other data, another identity
    assert build(moved, tmp_path / "two", **QUIET).hash != first.hash
    assert build(root, tmp_path / "three", window=100, **QUIET).hash != first.hash


def test_a_faster_decoder_sees_the_same_pictures_and_the_same_changes(tmp_path):
    pytest.importorskip("simplejpeg")
    root = write(tmp_path / "raw", {f"{i}.jpg": encode(noise(80, 60, seed=i), "JPEG") for i in range(3)})
    made = build(root, tmp_path / "out", progress=False)
    source = made.sources[0]
    for px in (None, 30):
        fast, plain = source.image(0, px, "simplejpeg"), source.image(0, px)
        assert fast.shape == plain.shape and (fast.int() - plain.int()).abs().max() <= 3
    (root / "1.jpg").write_bytes(encode(noise(80, 60, seed=9), "JPEG"))
    (root / "2.jpg").write_bytes((root / "2.jpg").read_bytes()[:-200])
    for i in (1, 2):
        with pytest.raises(RecordError, match=rf"{i}\.jpg, record {i} .*: changed"):
            source.image(i, None, "simplejpeg")


def test_data_that_moved_are_read_from_their_new_place(root, tmp_path):
    made = build(root, tmp_path / "out", **QUIET)
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"a\.png, record 0 \(a\.png\): cannot read"):
        made.sources[0].image(0)
    again = Index.open(made.folder, roots=[moved])
    assert torch.equal(again.sources[0].image(0), decode(png(0)).image)
    with pytest.raises(ConfigError, match="found 0"):
        Index.open(made.folder, roots=[])


def test_sources_travel_to_other_processes(root, tmp_path):
    made = build(root, tmp_path / "out", **QUIET)
    for source, twin in zip(made.sources, pickle.loads(pickle.dumps(made.sources))):
        assert (twin.name, twin.kind, len(twin)) == (source.name, source.kind, len(source))
        assert [x.tolist() for x in twin.texts(0)] == [x.tolist() for x in source.texts(0)]
    assert len(pickle.dumps(made.sources[0])) < 2000
    assert pickle.loads(pickle.dumps(made)).hash == made.hash


def test_every_altered_file_of_an_index_is_named(root, tmp_path):
    made = build(root, tmp_path / "out", **QUIET)
    names = sorted(p.name for p in made.folder.iterdir() if p.name != "quarantine.jsonl")
    assert len(names) > 20
    for name in names:
        path = made.folder / name
        whole = path.read_bytes()
        for part in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:part] + bytes([whole[part] ^ 1]) + whole[part + 1 :])
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                Index.open(made.folder)
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            Index.open(made.folder, verify=False)
        path.unlink()
        with pytest.raises((DataError, MissingInputError), match=name.replace(".", r"\.")):
            Index.open(made.folder, verify=False)
        path.write_bytes(whole)
    assert Index.open(made.folder).hash == made.hash


def test_an_index_is_replaced_whole_or_not_at_all(root, tmp_path, monkeypatch):
    first = build(root, tmp_path / "out", **QUIET)
    monkeypatch.setattr(Table, "close", _no_space)
    with pytest.raises(WriteError, match="No space left"):
        build(root, tmp_path / "out", **QUIET)
    monkeypatch.undo()
    assert Index.open(tmp_path / "out").hash == first.hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]
    (root / "a.png").write_bytes(png(5))
    assert build(root, tmp_path / "out", **QUIET).hash == Index.open(tmp_path / "out").hash != first.hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]


def _no_space(self):
    raise OSError(28, "No space left on device")


def test_settings_that_cannot_work_are_refused_before_anything_is_read(root, tmp_path):
    for wrong in ({"window": 2}, {"missing": "ignore"}):
        with pytest.raises(ConfigError, match="expected"):
            build(root, tmp_path / "out", **wrong, **QUIET)
    with pytest.raises(ConfigError, match="no index"):
        build(root, root, **QUIET)
    with pytest.raises(MissingInputError, match=r"no manifest\.json"):
        Index.open(root)


def test_roots_and_sources_keep_apart(root, tmp_path):
    other = write(tmp_path / "other", {"set.jsonl": '{"text": "words of the other"}'})
    made = build([root, other], tmp_path / "out", **QUIET)
    assert [(s.name, s.kind) for s in made.sources][-1] == ("set-2", "text")


def test_an_index_of_pictures_alone_has_no_tokenizer(tmp_path):
    made = build(write(tmp_path / "raw", {"cat/a.png": png()}), tmp_path / "out", progress=False)
    assert made.tokenizer is None and made.manifest["tokenizer"] is None and made.labels == ("cat",)
    assert made.sources[0].image(0).shape == (3, 12, 20)


def test_checking_finds_what_building_does_and_writes_nothing(root, tmp_path, capsys):
    (root / "c.png").write_bytes(b"no picture")
    before = sorted(tmp_path.rglob("*"))
    report = check(root, limits=Limits())
    assert sorted(tmp_path.rglob("*")) == before
    assert (report.seen, report.quarantined, dict(report.reasons)) == (6, 1, {"unreadable": 1})
    assert "4/4" not in capsys.readouterr().out  # the bar goes to stderr
    with pytest.raises(DataError):
        build(root, tmp_path / "out", **QUIET)
    rows = [json.loads(line) for line in (tmp_path / "out.rejected" / "quarantine.jsonl").read_text().splitlines()]
    assert rows == [fault.row() for fault in report.faults]


def test_a_description_counts_and_measures(root, tmp_path):
    rows = describe(build(root, tmp_path / "out", **QUIET))
    assert [(row["kind"], row["records"]) for row in rows] == [("pair", 3), ("image", 1), ("text", 2)]
    assert rows[0]["pixels"] == "20 x 12" and rows[0]["texts"] == 4 and rows[0]["unknown"] == "0.00%"
    assert rows[2]["texts"] == 1


# D15
def test_the_share_of_unknown_tokens_is_measured_and_warned_of(root, tmp_path, caplog):
    tokenizer = TextTokenizer.train(["a red dog"], 40)
    made = build(root, tmp_path / "out", tokenizer=tokenizer, progress=False)
    entry = made.manifest["sources"][0]
    ids = np.concatenate([x for i in range(3) for x in made.sources[0].texts(i)])
    assert entry["tokens"] == len(ids) and entry["unknown_tokens"] == (ids == tokenizer.unk).sum() > 0
    assert "source set (pair)" in caplog.text and "unknown" in caplog.text
    caplog.clear()
    build(root, tmp_path / "out", **QUIET)
    assert caplog.text == ""


# D23
def test_pictures_of_two_splits_are_compared_by_content(tmp_path):
    train = write(tmp_path / "train", {"a.png": png(0), "b.png": png(1), "c.png": png(2)})
    test = write(tmp_path / "test", {"x.png": png(7), "y.png": png(1), "z.png": png(1)})
    a, b = build(train, tmp_path / "a", progress=False), build(test, tmp_path / "b", progress=False)
    assert overlap(a, b) == [("b.png", "y.png"), ("b.png", "z.png")]
    assert overlap(b, a) == [("y.png", "b.png")]


def test_real_captions_come_back(tmp_path):
    archive = FLICKR / "flickr8k-224-base.tar.xz"
    if not archive.is_file():
        pytest.skip("flickr8k-224 is not here")
    rows, pictures = [], 0
    with tarfile.open(archive) as tar:
        for member in tar:
            pictures += member.name.endswith(".jpg")
            if member.name.endswith("val.jsonl") or (member.name.endswith(".jpg") and pictures <= 40):
                write(tmp_path, {Path(member.name).name: tar.extractfile(member).read()})
    table = tmp_path / "val.jsonl"
    for line in table.read_text().splitlines():
        row = json.loads(line)
        row["image"] = Path(row["image"]).name
        rows.append(row)
    table.write_text("\n".join(map(json.dumps, rows)))
    made = build(table, tmp_path / "out", missing="skip", vocab=512, progress=False)
    source = made.sources[0]
    report = made.manifest["report"]
    assert len(source) == 40 and report["seen"] == len(rows) == 1000
    assert report["reasons"] == {"missing": 960}
    captions = {row["image"]: row["captions"] for row in rows}
    for i in range(len(source)):
        assert source.strings(i) == [sanitize(c)[0] for c in captions[source.key(i)]]
        assert [made.tokenizer.text(x) for x in source.texts(i)] == source.strings(i)
        assert source.image(i).shape == (3, 224, 224)


def test_a_root_without_records_is_missing_input(tmp_path):
    root = write(tmp_path / "raw", {"a.md": "words", "b.md": ""})
    with pytest.raises(MissingInputError, match=r"nothing to read.*'\.md': 2"):
        build(root, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_labels_of_texts_are_counted_as_unused(tmp_path):
    root = write(tmp_path / "raw", {"a.tsv": "text\tlabel\ngood\t1\nbad\t0\n"})
    made = build(root, tmp_path / "out", **QUIET)
    assert made.manifest["report"]["notes"] == {"label_unused": 2} and made.labels == ()
