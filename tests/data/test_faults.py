"""Every fault that raw images and texts can have ends in its named result: counted, listed with file and key.

The names D1 to D23 are rows of one table of faults; those of sound, video and boxes belong elsewhere.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from multiway.data import records
from multiway.data.image import Limits, decode
from multiway.data.index import Report, build, check
from multiway.data.shards import walk
from multiway.data.sources import discover
from multiway.errors import DataError, RecordError
from tests.data.raw import encode, noise, png, samples, shard, write


def scanned(root: Path, **options) -> Report:
    """What a pass finds; the three counts add up whatever it is."""
    report = check(root, progress=False, **options)
    assert report.seen == sum(report.indexed.values()) + report.quarantined
    return report


def faults(root: Path, **options) -> list[tuple[str, str]]:
    """Key and reason of every fault of a pass."""
    return [(fault.where.key, fault.reason) for fault in scanned(root, **options).faults]


def jsonl(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


# --------------------------------------------------------------------------------------------------------------- D1


def test_d1_a_shard_cut_anywhere_is_reported_and_what_lies_before_is_used(tmp_path):
    whole = shard(tmp_path / "whole.tar", samples(12)).read_bytes()
    members = list(walk(io.BytesIO(whole), len(whole)))
    end = -(-(members[-1].offset + members[-1].size) // 512) * 512
    cuts = {*range(0, len(whole), 512), *random.Random(0).sample(range(1, len(whole)), 64)}
    for cut in sorted(cuts):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        report = scanned(path)
        if cut >= end + 1024:  # only padding is gone
            assert not report.faults and report.seen == 12
            continue
        damage = [fault for fault in report.faults if fault.shard]
        assert len(damage) == 1 and damage[0].where.file == "cut.tar"
        assert damage[0].reason == ("truncated" if cut else "empty")
        assert str(cut) in damage[0].message or not cut
        keys = sorted({m.name[:3] for m in members if m.offset + m.size <= cut})
        assert report.seen == len(keys)
        untrusted = [fault.where.key for fault in report.faults if not fault.shard]
        assert untrusted == keys[-1:]  # the sample at the cut may lack a member


def test_d1_a_damaged_shard_names_the_place_and_loses_nothing_before_it(tmp_path):
    whole = bytearray(shard(tmp_path / "s.tar", samples(6)).read_bytes())
    header = whole.index(b"003.png")
    whole[header : header + 512] = b"\xaa" * 512
    (tmp_path / "s.tar").write_bytes(whole)
    report = scanned(tmp_path / "s.tar")
    assert sum(report.indexed.values()) == 2 and report.reasons == {"header": 1, "truncated": 1}
    assert f"no tar header at byte {header}" in report.faults[0].message
    assert [f.where.key for f in report.faults] == ["002", "002"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404 not found</body></html>" + b" " * 600, "not_a_tar"),
        (b"\x1f\x8b\x08" + bytes(range(1, 200)) * 9, "not_a_tar"),
        (b"short", "truncated"),
    ],
)
def test_d1_what_is_no_shard_is_said_so(tmp_path, content, reason):
    path = tmp_path / "page.tar"
    path.write_bytes(content)
    report = scanned(path)
    assert [(f.where.file, f.reason, f.shard) for f in report.faults] == [("page.tar", reason, True)]
    with pytest.raises(DataError, match=r"1 of 1 shards are bad .*\n  page\.tar, byte 0: .*" + reason):
        build(path, tmp_path / "out", progress=False)


def test_d1_data_behind_the_end_are_reported(tmp_path):
    one = shard(tmp_path / "a.tar", samples(2)).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + shard(tmp_path / "b.tar", samples(2, 2)).read_bytes())
    report = scanned(tmp_path / "a.tar")
    assert report.faults[0].reason == "trailing_data" and report.faults[0].shard


def test_d1_few_damaged_shards_may_pass_by_setting(tmp_path):
    shard(tmp_path / "a.tar", samples(30))
    whole = shard(tmp_path / "b.tar", samples(30, 30)).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1 of 2 shards"):
        build(tmp_path, tmp_path / "out", progress=False)
    made = build(tmp_path, tmp_path / "out", max_bad_shards=0.5, max_bad_fraction=0.1, vocab=64, progress=False)
    assert 40 < len(made.sources[0]) < 60
    lines = [json.loads(line) for line in (made.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(x["scope"], x["file"], x["stage"]) for x in lines] == [
        ("shard", "b.tar", "read"),
        ("record", "b.tar", "parse"),
    ]


# ---------------------------------------------------------------------------------------------------------- D2 - D4


def special(name: str, kind: bytes, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def test_d2_hostile_members_are_refused_and_touch_no_file(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(png())
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "evil.tar"
    names = ["/etc/a.png", "../b.png", "x/../../c.png", "n\ne.png"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(special(name, tarfile.REGTYPE, size=len(png())), io.BytesIO(png()))
        tar.addfile(special("l.png", tarfile.SYMTYPE, linkname=str(outside)))
        tar.addfile(special("h.png", tarfile.LNKTYPE, linkname="good.png"))
        tar.addfile(special("d.png", tarfile.CHRTYPE))
        tar.addfile(special("f.png", tarfile.FIFOTYPE))
        tar.addfile(special("s.png", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,1"}))
        tar.addfile(special("folder", tarfile.DIRTYPE))
        tar.addfile(special("good.png", tarfile.REGTYPE, size=len(png())), io.BytesIO(png()))
    before = sorted(tmp_path.rglob("*"))
    report = scanned(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert {f.where.key: f.reason for f in report.faults} == {
        **{"/etc/a": "name", "../b": "name", "x/../../c": "name", "n\ne": "name"},
        **dict.fromkeys("lhdfs", "member_type"),
    }
    assert sum(report.indexed.values()) == 1


def test_d2_headers_without_measure_are_refused(tmp_path, monkeypatch):
    info = special("a.png", tarfile.REGTYPE, pax_headers={"comment": "x" * 2**17})
    with tarfile.open(tmp_path / "pax.tar", "w") as tar:
        tar.addfile(info)
    (report,) = scanned(tmp_path / "pax.tar").faults
    assert report.reason == "header" and "extended header" in report.message
    monkeypatch.setattr("multiway.data.shards.MAX_MEMBERS", 9)
    shard(tmp_path / "many.tar", samples(5))
    assert "over 9 members" in scanned(tmp_path / "many.tar").faults[0].message


def test_d2_a_size_that_lies_reads_nothing(tmp_path):
    info = special("a.png", tarfile.REGTYPE, size=2**40)
    (tmp_path / "big.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    (fault,) = scanned(tmp_path / "big.tar").faults
    assert fault.reason == "truncated" and f"needs bytes 512 to {2**40 + 512}, the shard ends at 1024" in fault.message


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("suffix", ["pkl", "pt", "npy", "x.pyd"])
def test_d3_executable_members_are_refused_and_never_run(tmp_path, suffix):
    canary = tmp_path / "canary"
    payload = pickle.dumps(Payload(canary))
    path = shard(tmp_path / "s.tar", [("a.png", png()), (f"a.{suffix}", payload), ("b.png", png())])
    report = scanned(path)
    assert [(f.where.key, f.reason) for f in report.faults] == [("a", "executable")]
    assert suffix in report.faults[0].message and not canary.exists()
    pickle.loads(payload)
    assert canary.exists()  # it would have worked


def test_d4_samples_whose_members_are_mixed_up_are_refused(tmp_path):
    members = [("a.png", png(0)), ("b.png", png(1)), ("a.txt", b"x"), ("c.png", png(2)), ("c.txt", b"y")]
    report = scanned(shard(tmp_path / "mix.tar", members))
    assert [(f.where.key, f.reason) for f in report.faults] == [("a", "interleaved")]
    assert report.indexed == {("mix", "image"): 1, ("mix", "pair"): 1}


def test_d4_members_and_keys_that_occur_again_are_refused_and_listed(tmp_path):
    shard(tmp_path / "s-0.tar", [("a.png", png(0)), ("a.png", png(1)), ("b.png", png(2)), ("b.jpg", png(2))])
    shard(tmp_path / "s-1.tar", samples(2))
    shard(tmp_path / "s-2.tar", samples(3))
    report = scanned(tmp_path)
    assert [(f.where.file, f.where.key, f.reason) for f in report.faults] == [
        ("s-0.tar", "a", "duplicate_member"),
        ("s-0.tar", "b", "duplicate_member"),
        ("s-2.tar", "000", "duplicate_key"),
        ("s-2.tar", "001", "duplicate_key"),
    ]
    assert sum(report.indexed.values()) == 3


# ---------------------------------------------------------------------------------------------------------- D5 - D6

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


@pytest.mark.parametrize("kind", KINDS)
def test_d5_unreadable_pictures_are_quarantined_by_name(tmp_path, kind):
    rng = np.random.default_rng(0)
    good = encode(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    suffix = kind.lower()
    write(
        tmp_path,
        {
            f"half.{suffix}": good[: len(good) // 2],
            f"head.{suffix}": good[:20],
            f"empty.{suffix}": b"",
            f"html.{suffix}": b"<html>404</html>",
            f"magic.{suffix}": b"\0\0\0\0" + good[4:],
            f"good.{suffix}": good,
        },
    )
    report = scanned(tmp_path)
    found = {f.where.key.split(".")[0]: f for f in report.faults}
    assert found["empty"].reason == "empty" and found["html"].reason == "unreadable"
    assert found["half"].reason in ("truncated", "corrupt", "unreadable")
    assert {"half", "head", "empty", "html"} <= set(found) <= {"half", "head", "empty", "html", "magic"}
    assert report.indexed[tmp_path.name, "image"] == 6 - len(found)
    assert all(f.stage in ("read", "decode") and f.message for f in report.faults)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_d5_a_wrong_suffix_does_not_matter(tmp_path):
    assert faults(write(tmp_path, {"a.jpg": png(), "b.png": encode(noise(), "JPEG")})) == []


@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_d5_broken_bytes_give_a_picture_or_a_reason(data, kind):
    whole = bytearray(encode(noise(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, _ = decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]), limits=Limits(max_pixels=10**6))
    except RecordError as error:
        assert error.reason and str(error)
    else:
        assert image.shape[0] == 3 and image.dtype == torch.uint8


def bombs() -> dict[str, bytes]:
    """Small files that say they are 400 megapixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = 20_000
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    gif, bmp = bytearray(encode(noise(), "GIF")), bytearray(encode(noise(), "BMP"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp[18:26] = struct.pack("<ii", side, side)
    avif = bytearray(encode(noise(16, 16), "AVIF"))
    extent = avif.index(b"ispe") + 8
    avif[extent : extent + 8] = struct.pack(">II", side, side)
    bits = (16383) | (16383 << 14)
    lossless = b"\x2f" + struct.pack("<I", bits) + b"\0" * 20
    webp = b"WEBPVP8L" + struct.pack("<I", len(lossless)) + lossless
    return {
        "b.png": b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""),
        "b.gif": bytes(gif),
        "b.bmp": bytes(bmp),
        "b.tiff": encode(Image.new("1", (side, side)), "TIFF", compression="group4"),
        "b.avif": bytes(avif),
        "b.webp": b"RIFF" + struct.pack("<I", len(webp)) + webp,
    }


def test_d6_bombs_are_refused_by_their_header(tmp_path):
    root = write(tmp_path, bombs())
    report = scanned(root)
    assert report.seen == report.quarantined == 6
    assert {f.where.key for f in report.faults if f.reason == "pixels"} >= {
        "b.png",
        "b.gif",
        "b.bmp",
        "b.tiff",
        "b.webp",
    }
    assert all(f.reason in ("pixels", "corrupt", "unreadable") for f in report.faults)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of /proc")
def test_d6_a_hundred_bombs_cost_no_memory(tmp_path):
    six = bombs()
    files = {f"{i}-{name}": data for i in range(17) for name, data in six.items()}
    write(tmp_path, files)
    script = """
import re, sys
from pathlib import Path
from multiway.data.index import check
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
report = check(sys.argv[1], progress=False)
print(report.quarantined, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    bad, grown = map(int, run.stdout.split())
    assert bad == len(files) == 102
    assert grown < 50_000  # kilobytes


@pytest.mark.parametrize(("size", "reason"), [((40_000, 10), "side"), ((3000, 40), "aspect"), ((9000, 9000), "pixels")])
def test_d6_sizes_out_of_measure_are_refused(tmp_path, size, reason):
    write(tmp_path, {"a.png": encode(Image.new("1", size))})
    assert faults(tmp_path) == [("a.png", reason)]


def test_d6_files_out_of_measure_are_not_even_read(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": png() + bytes(2000)})
    shard(tmp_path / "sub.tar", [("b.png", png() + bytes(2000))])
    opened = []
    monkeypatch.setattr("multiway.data.scan.open_picture", lambda *a: opened.append(a))
    for root, key in ((tmp_path / "sub.tar", "b"), (write(tmp_path / "f", {"a.png": bytes(3000)}), "a.png")):
        assert faults(root, limits=Limits(max_bytes=1000)) == [(key, "bytes")]
    assert not opened


# --------------------------------------------------------------------------------------------------------- D7 - D11


def test_d7_to_d10_conversions_are_counted_by_name(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [noise(seed=1)]}
    write(
        tmp_path / "raw",
        {
            "a.gif": encode(noise(), "GIF", **frames),
            "b.webp": encode(noise(), "WEBP", **frames),
            "c.jpg": encode(noise().convert("CMYK"), "JPEG"),
            "d.png": encode(Image.new("RGBA", (4, 4))),
            "e.png": encode(Image.new("I;16", (4, 4))),
            "f.jpg": encode(noise(), "JPEG", exif=exif),
            "g.tif": encode(Image.new("F", (4, 4)), "TIFF"),
            "h.png": png(),
        },
    )
    made = build(tmp_path / "raw", tmp_path / "out", max_bad_fraction=0.2, progress=False)
    report = made.manifest["report"]
    notes = {"animated_first_frame": 2, "cmyk": 1, "transparent": 1, "sixteen_bit": 1, "rotated": 1}
    assert report["notes"] == notes and report["reasons"] == {"mode": 1}
    source = made.sources[0]
    turned = next(i for i in range(len(source)) if source.key(i) == "f.jpg")
    assert source.size(turned) == (20, 12) and source.image(turned).shape == (3, 20, 12)


# -------------------------------------------------------------------------------------------------------- D14 - D18


def test_d14_text_that_is_not_utf8_is_refused_with_its_place(tmp_path):
    write(tmp_path, {"a.txt": b"good\n\nb\xe9te\n\nagain", "b.csv": b"text\nfine\nb\xe9te\nfine\n"})
    write(tmp_path, {"c.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n', "d.txt": "x".encode("utf-16")})
    for name, key in (("a.txt", "a.txt:3"), ("b.csv", "b.csv:3"), ("c.jsonl", "c.jsonl:2"), ("d.txt", "d.txt:1")):
        report = scanned(tmp_path / name)
        assert [(f.where.key, f.where.file, f.reason) for f in report.faults] == [(key, name, "utf8")]
        assert "not UTF-8" in report.faults[0].message


def test_d14_what_the_sanitizer_changes_is_counted(tmp_path):
    texts = ["\ufeffbom", "nul\x00", "\ud800", "e\u0301", "x" * 100_001, "clean", "<s> <mask>"]
    rows = [{"image": "a.png", "text": text} for text in texts]
    made = build(
        write(tmp_path / "raw", {"a.jsonl": jsonl(*rows), "a.png": png()}), tmp_path / "out", vocab=64, progress=False
    )
    assert made.manifest["report"]["notes"] == {
        "invisible_removed": 1,
        "controls_removed": 1,
        "surrogates_replaced": 1,
        "recomposed": 1,
        "text_cut": 1,
    }
    source = made.sources[0]
    ids = np.concatenate([source.texts(i)[0] for i in range(len(source))])
    assert not np.isin(ids, [0, 1, 2, made.tokenizer.hide]).any() and ids.max() < made.tokenizer.vocab
    assert source.strings(6) == ["<s> <mask>"]


def test_d16_empty_captions_are_dropped_or_their_pair_is_refused(tmp_path):
    rows = [
        {"image": "a.png", "captions": ["", "good", " \u200b"]},
        {"image": "a.png", "captions": []},
        {"image": "a.png", "text": "\x00"},
        {"text": ""},
        {"image": "a.png", "text": "!"},
    ]
    write(tmp_path, {"a.jsonl": jsonl(*rows), "a.png": png(), "b.csv": "image,text\na.png,\na.png, \n"})
    report = scanned(tmp_path / "a.jsonl")
    assert [(f.where.line, f.reason) for f in report.faults] == [
        (2, "empty_text"),
        (3, "empty_text"),
        (4, "empty_text"),
    ]
    assert report.indexed == {("a", "pair"): 2} and report.notes["empty_text_dropped"] == 2
    table = scanned(tmp_path / "b.csv")
    assert table.indexed == {("b", "image"): 1} and [f.where.line for f in table.faults] == [3]


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ({"image": 5}, "type", "field image: expected text, found int"),
        ({"image_path": ["a.png"]}, "type", "field image_path"),
        ({"captions": ["a", 7]}, "type", "field captions[1]: expected text, found int"),
        ({"text": {"a": 1}}, "type", "field text"),
        ({"text": "a", "label": 1.5}, "type", "field label"),
        ({"text": "a", "label": True}, "type", "field label"),
        ({"label": 3}, "schema", "neither an image (image, image_path) nor a text (text, caption, captions)"),
        ([1, 2], "type", "expected an object, found list"),
        ({"image": "sound.png"}, "unreadable", "RIFF"),
    ],
)
def test_d17_fields_of_the_wrong_kind_are_named(tmp_path, row, reason, says):
    wave = b"RIFF\x24\0\0\0WAVEfmt " + bytes(60)
    write(tmp_path, {"a.jsonl": jsonl({"text": "good"}, row), "sound.png": wave})
    (fault,) = scanned(tmp_path).faults
    assert fault.reason == reason and says in fault.message
    assert (fault.where.file, fault.where.line) == ("a.jsonl", 2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "json"),
        ('{"text": "a", "text": "b"}', "duplicate_field"),
        ('{"text": "a", "x": NaN}', "not_finite"),
        ('{"text": "a", "x": [-Infinity]}', "not_finite"),
        ("[" * 100_000, "json"),
        ('{"x": ' + "9" * 5000 + "}", "json"),
        ('{"text": "' + "a" * 3000 + '"}', "line_too_long"),
    ],
)
def test_d18_a_broken_line_is_named_by_number_and_offset(tmp_path, line, reason, monkeypatch):
    if reason == "line_too_long":
        monkeypatch.setattr("multiway.data.sources.MAX_LINE", 2000)
    write(tmp_path, {"a.jsonl": b"\xef\xbb\xbf" + jsonl({"text": "é"}, line, {"text": "good"}).encode()})
    report = scanned(tmp_path)
    (fault,) = report.faults
    assert (fault.reason, fault.where.line, fault.where.offset) == (reason, 2, 3 + len('{"text": "\\u00e9"}') + 1)
    assert report.indexed[("a", "text")] == 2 and len(fault.message) <= 300


def test_d18_broken_rows_of_a_csv_cost_themselves_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("multiway.data.sources.MAX_LINE", 200)
    rows = ["text,label", "a,1", "too,many,fields", '"b"x,2', "c" * 300 + ",3", "d,4", '"open, 5', "e,6"]
    report = scanned(write(tmp_path, {"a.csv": "\n".join(rows)}))
    found = [(f.where.line, f.reason) for f in report.faults]
    assert found == [(3, "fields"), (4, "csv"), (5, "line_too_long"), (7, "csv")]
    assert "lines 7 to 8" in report.faults[-1].message  # an open quote takes what follows, and says so
    assert report.indexed[("a", "text")] == 2


# -------------------------------------------------------------------------------------------------------- D19 - D22


def test_d19_paths_out_of_the_root_are_refused(tmp_path):
    root = write(tmp_path / "root", {"good.png": png(), "sub/also.png": png(1)})
    outside = write(tmp_path / "outside", {"secret.png": png(2)})
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "inner.png").symlink_to(root / "good.png")
    os.mkfifo(root / "pipe.png")
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(root)
    listener.bind("socket.png")
    listener.close()
    bad = {
        str(outside / "secret.png"): "path",
        "../outside/secret.png": "path",
        "sub/../../outside/secret.png": "path",
        "link.png": "path",
        "folder/secret.png": "path",
        "a\0b.png": "path",
        "\ud800.png": "path",
        "x" * 5000: "io",
        "": "path",
        "loop.png": "path",
        "pipe.png": "not_a_file",
        "socket.png": "not_a_file",
        "sub": "not_a_file",
        "none.png": "missing",
        "good.png/x.png": "missing",
        "/dev/zero": "path",
    }
    good = ["good.png", "sub/also.png", "./sub//also.png", "inner.png"]
    write(root, {"a.jsonl": jsonl(*({"image": name} for name in [*bad, *good]))})
    report = scanned(root)
    assert {f.where.key if f.where.key in bad else list(bad)[f.where.line - 1]: f.reason for f in report.faults} == bad
    assert [f.where.line for f in report.faults if f.reason == "path"] == [
        i + 1 for i, reason in enumerate(bad.values()) if reason == "path"
    ]
    assert report.indexed == {("a", "image"): len(good)}


def test_d19_a_folder_is_walked_without_following_links_out(tmp_path):
    root = write(tmp_path / "root", {"good.png": png()})
    outside = write(tmp_path / "outside", {"secret.png": png(2)})
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    assert faults(root) == [("out.png", "path")]


def test_d19_files_that_may_not_be_read_are_listed(tmp_path, monkeypatch):
    root = write(tmp_path, {"a.png": png(), "b.png": png(), "c.txt": "words"})
    opened = os.open

    def closed(path, *args, **kwargs):
        if not str(path).endswith("b.png"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("multiway.data.records.os.open", closed)
    report = scanned(root)
    assert [(f.where.key, f.reason) for f in report.faults] == [("a.png", "permission"), ("c.txt", "permission")]
    assert sum(report.indexed.values()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_d19_folders_without_permission_are_listed(tmp_path):
    root = write(tmp_path, {"a.png": png(), "closed/b.png": png(), "c.png": png()})
    (root / "a.png").chmod(0)
    (root / "closed").chmod(0)
    assert sorted(r for _, r in faults(root)) == ["permission", "permission"]
    (root / "closed").chmod(0o700)


def test_d19_missing_pictures_count_or_are_listed_by_policy(tmp_path):
    rows = [{"image": f"{i}.png", "text": "words of a caption"} for i in range(10)]
    root = write(tmp_path / "raw", {"a.jsonl": jsonl(*rows), **{f"{i}.png": png(i) for i in range(5)}})
    with pytest.raises(DataError, match=r"5 of 10 records .*\(missing 5\), 5 records are good") as error:
        build(root, tmp_path / "out", vocab=32, progress=False)
    assert error.value.exit_code == 65
    message = str(error.value)
    assert "a.jsonl 5.png, line 6" in message and "8.png" not in message  # the first three
    assert "out.rejected" in message and not (tmp_path / "out").exists()
    listed = [json.loads(line) for line in (tmp_path / "out.rejected" / "quarantine.jsonl").read_text().splitlines()]
    assert [(x["key"], x["line"], x["reason"]) for x in listed] == [
        (f"{i}.png", i + 1, "missing") for i in range(5, 10)
    ]
    made = build(root, tmp_path / "out", vocab=32, missing="skip", progress=False)
    assert len(made.sources[0]) == 5 and not (tmp_path / "out.rejected").exists()
    report = made.manifest["report"]
    assert (report["seen"], report["indexed"], report["quarantined"]) == (10, 5, 5)
    assert len((made.folder / "quarantine.jsonl").read_text().splitlines()) == 5
    (root / "4.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="1 of 10 records"):
        build(root, tmp_path / "out", vocab=32, missing="skip", progress=False)


def test_d20_a_file_that_changes_is_named_with_both_fingerprints(tmp_path):
    root = write(tmp_path / "raw", {f"{i}.png": png(i) for i in range(4)})
    source = build(root, tmp_path / "out", progress=False).sources[0]
    indexed = (root / "1.png").stat()
    expected = source.image(0)
    os.utime(root / "0.png", (1, 1))  # touched, but the same bytes
    assert torch.equal(source.image(0), expected)
    (root / "1.png").write_bytes(png(9))
    os.truncate(root / "2.png", 10)
    (root / "3.png").unlink()
    for i, reason in ((1, "changed"), (2, "changed"), (3, "missing")):
        with pytest.raises(RecordError) as error:
            source.image(i)
        assert error.value.reason == reason and f"{i}.png, record {i}" in str(error.value)
        if i == 1:
            for status in (indexed, (root / "1.png").stat()):
                assert f"Fingerprint(size={status.st_size}, mtime_ns={status.st_mtime_ns})" in str(error.value)


def test_d20_a_shard_cut_under_the_reader_is_an_error_and_no_signal(tmp_path):
    path = shard(tmp_path / "s.tar", samples(5))
    source = build(path, tmp_path / "out", vocab=64, progress=False).sources[0]
    os.truncate(path, 1500)
    assert torch.equal(source.image(0), decode(png(0)).image)  # its bytes are still there
    with pytest.raises(RecordError, match=r"s\.tar, record 4 \(004\): changed") as error:
        source.image(4)
    assert error.value.reason == "changed"


@pytest.mark.parametrize("number", sorted(records.FLAKY))
def test_d22_flaky_storage_is_read_again_and_counted(tmp_path, number, monkeypatch):
    root = write(tmp_path, {f"{i}.png": png(i) for i in range(6)})
    calls, opened = [], os.open

    def flaky(path, *args, **kwargs):
        calls.append(path)
        if len(calls) % 3 == 0:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(records, "RETRY_SECONDS", 0)
    monkeypatch.setattr("multiway.data.records.os.open", flaky)
    report = scanned(root)
    assert not report.faults and report.notes == {"read_again": 2}
    monkeypatch.setattr(
        "multiway.data.records.os.open", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk"))
    )
    assert {reason for _, reason in faults(root)} == {"io"}


# ------------------------------------------------------------------------------------------------ the contract of all


def test_nothing_is_lost_silently_over_a_heap_of_faults(tmp_path):
    """Good and bad records of all kinds: every one is indexed or listed, with file and key; too many exit with 65."""
    rng = random.Random(1)
    rows, files, bad = [], {}, set()
    for i in range(300):
        data, name = png(i), f"p/{i}.png"
        kind = rng.choice(["good"] * 7 + ["cut", "html", "missing", "empty caption", "broken"])
        if kind != "good":
            bad.add(i)
        if kind != "missing":
            files[name] = data[: len(data) // 2] if kind == "cut" else b"<html>" if kind == "html" else data
        row = json.dumps({"image": name, "text": "" if kind == "empty caption" else f"picture {i}"})
        rows.append(row[:-1] if kind == "broken" else row)
    root = write(tmp_path / "raw", files | {"set.jsonl": "\n".join(rows)})
    with pytest.raises(DataError) as error:
        build(root, tmp_path / "out", progress=False)
    assert error.value.exit_code == 65 and f"{len(bad)} of 300 records" in str(error.value)
    made = build(root, tmp_path / "out", max_bad_fraction=0.9, vocab=64, progress=False)
    lines = [json.loads(line) for line in (made.folder / "quarantine.jsonl").read_text().splitlines()]
    assert {line["line"] - 1 for line in lines} == bad and len(lines) == len(bad)
    assert {made.sources[0].key(i) for i in range(len(made.sources[0]))} == {
        f"p/{i}.png" for i in set(range(300)) - bad
    }
    report = made.manifest["report"]
    assert report["seen"] == 300 == report["indexed"] + report["quarantined"]
    for line in lines:
        assert line["source"] == "set" and line["file"] == "set.jsonl" and line["key"]
        assert line["stage"] in ("read", "parse", "validate", "decode") and 0 < len(line["message"]) <= 300


def test_reading_again_finds_the_same(tmp_path):
    root = write(tmp_path, {"b/a.png": png(), "c.txt": "text", "a/x.png": b"", "a/x.txt": "caption"})
    first = [list(source) for source in discover(root)]
    assert first == [list(source) for source in discover(root)]
    assert len(first[0]) == 3
