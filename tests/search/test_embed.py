"""Embedding: what gets a row, restarts to the byte, sharing the work, and refusals."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from multiway.data.index import build
from multiway.errors import ConfigError, DataError, MissingInputError, NumericsError, WriteError
from multiway.search import embed as module
from multiway.search import store as store_module
from multiway.search.embed import embed, list_entries
from multiway.search.store import Store
from tests.tiny import CAPTIONS, pretrained, tokenizer, write_pictures

MODEL = pretrained()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)


@pytest.fixture
def folder(tmp_path) -> Path:
    """10 pictures and 3 texts, one of them empty; two more files are no pictures, one of another kind."""
    root = tmp_path / "data"
    write_pictures(root, 10)
    (root / "003.png").write_bytes(b"no picture at all")
    (root / "007.png").write_bytes((root / "008.png").read_bytes()[:200])
    (root / "notes.txt").write_text(f"{CAPTIONS[1]}\n\n\u200b\n\n{CAPTIONS[2]}\n")
    (root / "clip.mp4").write_bytes(b"x")
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".tmp-")}


def test_pictures_are_seen_as_the_model_wants_them(tmp_path):
    """The centre is taken once."""
    made, paths = pretrained(share=0.5), write_pictures(tmp_path / "data", 3)
    embed(tmp_path / "data", made, tmp_path / "store")
    assert torch.allclose(Store.open(tmp_path / "store").vectors, made.encode_image(paths), atol=1e-5)


def test_every_record_has_a_row_or_a_fault(folder, tmp_path, capsys):
    assert embed(folder, MODEL, tmp_path / "store") == 3
    store = Store.open(tmp_path / "store")
    records = [store.record(row) for row in range(len(store))]
    assert [record["key"] for record in records if record["kind"] == "image"] == [
        f"00{i}.png" for i in (0, 1, 2, 4, 5, 6, 8, 9)
    ]
    texts = [record["captions"] for record in records if record["kind"] == "text"]
    assert texts == [[CAPTIONS[1]], [CAPTIONS[2]]]
    quarantine = [json.loads(line) for line in (tmp_path / "store" / "quarantine.jsonl").read_text().splitlines()]
    assert quarantine == store.faults
    assert [(fault["key"], fault["stage"], fault["reason"]) for fault in quarantine] == [
        ("003.png", "decode", "unreadable"),
        ("007.png", "decode", "truncated"),
        ("notes.txt:3", "validate", "empty_text"),
    ]
    assert len(store) + len(quarantine) == list_entries(folder).count == 13
    said = capsys.readouterr().err
    assert "3 bad records" in said
    assert "1 files of other kinds" in said


def test_rows_are_the_model_s_vectors(folder, tmp_path):
    embed(folder, MODEL, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert store.vectors.shape == (10, 32)
    for row, vector in enumerate(store.vectors):
        record = store.record(row)
        again = (
            MODEL.encode_text(record["captions"][0]) if record["kind"] == "text" else MODEL.encode_image(record["path"])
        )
        assert torch.allclose(again[0], vector, atol=1e-6)
    with pytest.raises(IndexError, match="row 10 of a store with 10"):
        store.record(10)


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.mark.parametrize("at", range(0, 9))
def test_killed_anywhere_it_continues_to_the_same_bytes(folder, tmp_path, monkeypatch, at):
    embed(folder, MODEL, tmp_path / "whole")
    renames = 0
    plain = Path.replace

    def replace(path, target):
        nonlocal renames
        if renames == at:
            raise Killed
        renames += 1
        return plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):  # 1 manifest, 4 chunks of 2 files, 1 quarantine: 10 renames
            embed(folder, MODEL, tmp_path / "killed")
    embed(folder, MODEL, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_finished_chunks_are_not_computed_again(folder, tmp_path, monkeypatch):
    embed(folder, MODEL, tmp_path / "store")
    before = content(tmp_path / "store")
    (tmp_path / "store" / "chunk-000002.safetensors").unlink()
    computed = []
    plain = module.write_chunk
    monkeypatch.setattr(module, "write_chunk", lambda *given: (computed.append(given[1]), plain(*given)))
    embed(folder, MODEL, tmp_path / "store")
    assert computed == [2]
    assert content(tmp_path / "store") == before


@pytest.mark.parametrize("file", ["chunk-000001.safetensors", "chunk-000001.jsonl"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_chunk_is_found_and_computed_again(folder, tmp_path, file, damage, capsys):
    embed(folder, MODEL, tmp_path / "store")
    before = content(tmp_path / "store")
    path = tmp_path / "store" / file
    data = bytearray(path.read_bytes())
    data[-1 if "tensors" in file else 20] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-5])
    if damage == "remove":
        path.unlink()
    with pytest.raises(DataError, match="multiway embed"):
        Store.open(tmp_path / "store")
    embed(folder, MODEL, tmp_path / "store")
    assert content(tmp_path / "store") == before
    assert ("computing it again" in capsys.readouterr().err) == (path.name.endswith("jsonl") or damage != "remove")


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shared_work_gives_the_same_bytes(folder, tmp_path, monkeypatch, world):
    embed(folder, MODEL, tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        embed(folder, MODEL, tmp_path / "shared")
        if rank:
            with pytest.raises(DataError, match="chunks 0"):
                Store.open(tmp_path / "shared")
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        embed(folder, MODEL, tmp_path / "shared", rank=2, world=2)


def test_tables_shards_and_text_files(tmp_path):
    [path] = write_pictures(tmp_path, 1)
    rows = [
        {"image": "000.png", "captions": CAPTIONS[:2]},
        {"text": "red"},
        {"image": "../000.png"},
        {"image": "no.png"},
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert embed(tmp_path / "table.jsonl", MODEL, tmp_path / "a") == 2
    store = Store.open(tmp_path / "a")
    assert [store.record(row)["captions"] for row in range(2)] == [CAPTIONS[:2], ["red"]]
    assert [fault["reason"] for fault in store.faults] == ["path", "missing"]

    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for name, data in (("x.png", path.read_bytes()), ("x.txt", b"in a shard")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    embed(tmp_path / "shard-000.tar", MODEL, tmp_path / "b")
    shard = Store.open(tmp_path / "b")
    assert shard.record(0) == {
        "kind": "image",
        "key": "x",
        "path": str(tmp_path / "shard-000.tar"),
        "captions": ["in a shard"],
    }
    assert torch.allclose(shard.vectors[0], store.vectors[0], atol=1e-6)

    (tmp_path / "lines.txt").write_text("red\n\nblue\n")
    embed(tmp_path / "lines.txt", MODEL, tmp_path / "c")
    assert torch.allclose(Store.open(tmp_path / "c").vectors, MODEL.encode_text(["red", "blue"]), atol=1e-6)


def test_an_index_gives_the_vectors_of_its_folder(tmp_path):
    write_pictures(tmp_path / "data", 9)
    build(tmp_path / "data", tmp_path / "index", tokenizer=tokenizer(), progress=False)
    embed(tmp_path / "data", MODEL, tmp_path / "raw")
    assert embed(tmp_path / "index", MODEL, tmp_path / "indexed") == 0
    raw, indexed = Store.open(tmp_path / "raw"), Store.open(tmp_path / "indexed")
    by_key = {raw.record(row)["key"]: row for row in range(len(raw))}
    assert len(indexed) == 9
    for row in range(9):
        record = indexed.record(row)
        assert record == raw.record(by_key[record["key"]])
        assert torch.allclose(indexed.vectors[row], raw.vectors[by_key[record["key"]]], atol=1e-6)


def test_a_split_is_chosen(tmp_path):
    write_pictures(tmp_path / "train", 3)
    write_pictures(tmp_path / "val", 2, seed=1)
    with pytest.raises(ConfigError, match="choose one"):
        embed(tmp_path, MODEL, tmp_path / "store")
    embed(tmp_path, MODEL, tmp_path / "store", split="val")
    assert len(Store.open(tmp_path / "store")) == 2


# ------------------------------------------------------------------------------------------------------------- refusals


def test_vectors_of_two_models_are_never_mixed(folder, tmp_path):
    embed(folder, MODEL, tmp_path / "store")
    before = content(tmp_path / "store")
    with pytest.raises(ConfigError, match="vectors of another model"):
        embed(folder, pretrained(seed=1), tmp_path / "store")
    write_pictures(tmp_path / "more", 2)
    with pytest.raises(ConfigError, match="vectors of another data"):
        embed(tmp_path / "more", MODEL, tmp_path / "store")
    (folder / "009.png").unlink()
    with pytest.raises(ConfigError, match="vectors of another data"):
        embed(folder, MODEL, tmp_path / "store")
    assert content(tmp_path / "store") == before


@pytest.mark.parametrize(("value", "length"), [(float("nan"), "nan"), (0.0, "0"), (2.0, "2")])
def test_vectors_without_length_one_are_refused(folder, tmp_path, monkeypatch, value, length):
    plain = type(MODEL).encode_image

    def wrong(self, images, **rest):
        vectors = plain(self, images, **rest)
        vectors[1] *= value
        return vectors

    monkeypatch.setattr(type(MODEL), "encode_image", wrong)
    with pytest.raises(NumericsError, match=f"001.png has length {length}, expected 1"):
        embed(folder, MODEL, tmp_path / "store")
    assert not list((tmp_path / "store").glob("chunk-*"))


def test_a_store_with_other_vectors_than_unit_ones_is_refused(tmp_path, folder, monkeypatch):
    embed(folder, MODEL, tmp_path / "store")
    monkeypatch.setattr(store_module, "check_lengths", lambda *_: None)
    store_module.write_chunk(tmp_path / "store", 0, torch.zeros(1, 32), [{"key": "x"}], [])
    monkeypatch.undo()
    with pytest.raises(NumericsError, match="row 0 of .*chunk-000000"):
        Store.open(tmp_path / "store")


def test_nothing_good_and_nothing_at_all(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match="all 1 records are bad"):
        embed(tmp_path / "bad", MODEL, tmp_path / "store")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="nothing to embed"):
        embed(tmp_path / "none", MODEL, tmp_path / "other")
    with pytest.raises(MissingInputError):
        embed(tmp_path / "nowhere", MODEL, tmp_path / "other")
    with pytest.raises(MissingInputError, match=r"store\.json"):
        Store.open(tmp_path / "other")


def test_a_disk_that_refuses(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot write the store"):
        embed(folder, MODEL, tmp_path / "file" / "store")


def test_a_manifest_that_is_none(folder, tmp_path):
    embed(folder, MODEL, tmp_path / "store")
    for text in ("{", "[]", '{"format": 2}'):
        (tmp_path / "store" / "store.json").write_text(text)
        with pytest.raises(DataError, match="embed into a new folder"):
            Store.open(tmp_path / "store")
