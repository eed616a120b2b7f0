"""What is found in files and folders, in which order, as which kind."""

from __future__ import annotations

import csv
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiway.data import records, shards
from multiway.data.records import Fault, Ignored, Record
from multiway.data.sources import RawSource, discover
from multiway.errors import ConfigError, DataError, MissingInputError
from tests.data.raw import png, samples, shard, write


def read(root, split=None):
    return [item for source in discover(root, split) for item in source]


def found(root, split=None):
    """What was found as plain values: kind, picture, texts, label."""
    return [(r.kind, r.image and r.image.file, r.texts, r.label) for r in read(root, split)]


def test_a_folder_gives_pictures_with_labels_and_captions_in_order(tmp_path):
    write(
        tmp_path,
        {
            "dog/b.png": "",
            "dog/a.JPG": "",
            "dog/a.txt": "one\n\n two \n",
            "cat/x/c.webp": "",
            "top.gif": "",
            "notes.txt": "first document\nsame\n\nsecond",
            "readme.md": "",
            ".hidden.png": "",
            ".git/d.png": "",
        },
    )
    items = read(tmp_path)
    assert [(r.kind, r.where.key, r.texts, r.label) for r in items if isinstance(r, Record)] == [
        ("text", "notes.txt:1", ("first document\nsame\n",), None),
        ("text", "notes.txt:4", ("second",), None),
        ("image", "top.gif", (), None),
        ("image", "cat/x/c.webp", (), "cat"),
        ("pair", "dog/a.JPG", ("one", " two "), "dog"),
        ("image", "dog/b.png", (), "dog"),
    ]
    assert [item.file for item in items if isinstance(item, Ignored)] == [".hidden.png", "readme.md"]


def test_jsonl_gives_its_fields_and_ignores_others(tmp_path):
    rows = [
        {"image": "i/a.jpg", "captions": ["one", "two"], "split": "train", "captions_zh": [1]},
        {"image_path": "i/b.jpg", "caption": "three", "label": 7},
        {"image": "i/c.jpg", "text": None, "label": "cat"},
        {"text": "alone"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)
    write(tmp_path, {"set.jsonl": text, "i/a.jpg": ""})
    assert found(tmp_path) == [
        ("pair", "i/a.jpg", ("one", "two"), None),
        ("pair", "i/b.jpg", ("three",), "7"),
        ("image", "i/c.jpg", (), "cat"),
        ("text", None, ("alone",), None),
    ]
    where = read(tmp_path)[1].where
    assert (where.file, where.line, where.key) == ("set.jsonl", 3, "i/b.jpg")
    raw = (tmp_path / "set.jsonl").read_bytes()
    assert json.loads(raw[where.offset : where.offset + where.bytes]) == rows[1]


def test_csv_and_tsv_follow_their_header(tmp_path):
    write(tmp_path, {"a.csv": 'caption,other,image,label\n"a ""red"", big\nball",,x.png,3\n,,y.png,\n\nonly text,,,\n'})
    write(tmp_path, {"b.tsv": 'text\timage\n"quoted" it\'s\tz.png\n'})
    assert found(tmp_path) == [
        ("pair", "x.png", ('a "red", big\nball',), "3"),
        ("image", "y.png", (), None),
        ("text", None, ("only text",), None),
        ("pair", "z.png", ('"quoted" it\'s',), None),
    ]
    assert [item.where.line for item in read(tmp_path)] == [2, 4, 6, 2]


def test_shards_give_adjacent_members_as_one_sample(tmp_path):
    members = [
        ("./d/1.jpg", png()),
        ("./d/1.txt", b"one\ntwo"),
        ("./d/1.json", b'{"caption": "not used", "label": 4}'),
        ("d/2.seg.png", b"x"),
        ("d/2.png", png(1)),
        ("d/2.cls", b"5\n"),
        ("d/3.json", b'{"text": "alone"}'),
    ]
    path = shard(tmp_path / "s.tar", members)
    items = read(path)
    assert [(r.kind, r.where.key, r.texts, r.label) for r in items if isinstance(r, Record)] == [
        ("pair", "d/1", ("one", "two"), "4"),
        ("image", "d/2", (), "5"),
        ("text", "d/3", ("alone",), None),
    ]
    assert [item.file for item in items if isinstance(item, Ignored)] == ["d/2.seg.png"]
    span = items[0].image
    assert path.read_bytes()[span.offset : span.offset + span.length] == png()


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_in_every_tar_format(tmp_path, style):
    long = "d/" * 40 + "k" * 90 if style == tarfile.USTAR_FORMAT else "é" * 80 + "k" * 150
    path = shard(tmp_path / "s.tar", [(f"{long}.png", png()), (f"{long}.txt", b"x"), *samples(1)], format=style)
    assert [(r.kind, r.where.key) for r in read(path)] == [("pair", long), ("pair", "000")]


@given(st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 220)), max_size=6))
def test_offsets_agree_with_tarfile(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("tar") / "s.tar"
    shard(path, [(f"{i}{'n' * length}.png", bytes([i + 1]) * size) for i, (size, length) in enumerate(sizes)])
    with tarfile.open(path) as tar, open(path, "rb") as stream:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
        members = list(shards.walk(stream, path.stat().st_size))
    assert [(m.name, m.offset, m.size) for m in members] == expected


def test_documents_end_at_blank_lines(tmp_path):
    write(tmp_path, {"t.txt": "\ufeffa\nb\r\n \t \n\n\nc\n"})
    assert [(r.texts, r.where.line) for r in read(tmp_path / "t.txt")] == [(("a\nb\r\n",), 1), (("c\n",), 6)]


@given(text=st.text(st.sampled_from("aé你😀 \n"), max_size=80))
def test_long_documents_come_in_whole_pieces(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiway.data.sources.MAX_LINE", 16)
        items = read(path)
    assert all(isinstance(item, Record) and item.where.bytes <= 16 for item in items)
    lines = text.split("\n")
    assert "".join(r.texts[0] for r in items).replace("\n", "") == "".join(line for line in lines if line.strip())


def test_splits_are_chosen_by_name(tmp_path):
    write(tmp_path, {"train.jsonl": '{"text": "a"}', "val.jsonl": '{"text": "b"}', "itm_train.jsonl": '{"text": "c"}'})
    assert found(tmp_path, "train") == [("text", None, ("a",), None)]
    assert discover(tmp_path, "val")[0].name == "val"
    with pytest.raises(ConfigError, match="splits train, val: choose one"):
        discover(tmp_path)
    with pytest.raises(MissingInputError, match="no split 'test'"):
        discover(tmp_path, "test")


def test_splits_may_be_shards_or_folders(tmp_path):
    root = write(tmp_path / "shards", {})
    root.mkdir()
    shard(root / "train-000.tar", samples(2))
    shard(root / "train-001.tar", samples(1, first=2))
    shard(root / "val-000.tar", samples(1, first=3))
    assert [r.where.key for r in read(root, "train")] == ["000", "001", "002"]
    assert discover(root, "train") == [RawSource("train", "tar", root, ("train-000.tar", "train-001.tar"))]
    folder = write(tmp_path / "folders", {"train/cat/a.png": "", "test/cat/b.png": ""})
    assert found(folder, "test") == [("image", "cat/b.png", (), "cat")]


def test_a_root_must_be_there_and_a_table_must_name_its_columns(tmp_path):
    with pytest.raises(MissingInputError, match="no such file or folder"):
        discover(tmp_path / "none")
    for header in ("a,b\n1,2\n", "", "image,image\n", '"image\n'):
        write(tmp_path, {"t.csv": header})
        with pytest.raises(DataError, match=r"t\.csv: the first line must name the columns"):
            read(tmp_path / "t.csv")


@given(
    st.lists(st.one_of(st.binary(max_size=30), st.text(max_size=20).map(lambda t: json.dumps({"text": t}).encode())))
)
def test_every_line_of_a_jsonl_is_a_record_or_a_fault(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    content = b"\n".join(lines)
    path.write_bytes(content)
    items = read(path)
    expected = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert len(items) == len(expected)
    for item, line in zip(items, expected):
        assert content[item.where.offset :].removeprefix(b"\xef\xbb\xbf").startswith(line)
        assert isinstance(item, Record) or (item.stage == "parse" and item.reason and item.message)


@given(rows=st.lists(st.tuples(*[st.text("ab,\"'\n\tü", max_size=6)] * 2), max_size=8))
def test_whatever_csv_can_hold_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "text"), *((f"i{a}", f"t{b}") for a, b in rows)])
    items = read(path)
    assert [(r.where.key, r.texts) for r in items] == [(f"i{a}", (f"t{b}",)) for a, b in rows]


def test_bytes_of_a_file_are_read_with_its_fingerprint(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    content = records.read_bytes(path, 2, 3)
    assert content.data == b"234" and content.retries == 0
    assert content.fingerprint == (10, path.stat().st_mtime_ns)
    assert records.read_bytes(path, most=10).data == b"0123456789"


def test_a_fault_says_where_it_is():
    where = records.Where("set", "a.tar", "007", offset=512, bytes=9)
    fault = Fault(where, "decode", "corrupt", "broken")
    assert str(fault) == "a.tar 007, byte 512: broken [corrupt]"
    assert fault.row()["key"] == "007" and fault.row()["scope"] == "record"
