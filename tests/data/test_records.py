"""Bytes of a file: just those that were asked for, whole, or an error with its reason."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from multiway.data import records
from multiway.data.records import open_file, read_bytes
from multiway.errors import RecordError

CONTENT = bytes(range(256)) * 40
OPEN = Path("/proc/self/fd")


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    return file


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, None), (100, None), (0, 0), (7, 300), (10_000, 10**9), (10_240, 5), (20_000, 5), (10**6, None)],
)
@pytest.mark.parametrize("most_at_once", [10**6, 333])
def test_the_bytes_asked_for_are_read(path, offset, length, most_at_once, monkeypatch):
    whole = os.pread
    monkeypatch.setattr(records.os, "pread", lambda file, count, at: whole(file, min(count, most_at_once), at))
    content = read_bytes(path, offset, length)
    assert content.data == CONTENT[offset:][:length]
    assert content.fingerprint == (len(CONTENT), path.stat().st_mtime_ns) and content.retries == 0


def test_a_file_over_the_limit_is_not_read(path, monkeypatch):
    assert read_bytes(path, most=len(CONTENT)).data == CONTENT
    monkeypatch.setattr(records.os, "pread", None)
    with pytest.raises(RecordError, match="has 10240 bytes, at most 10239 are allowed") as error:
        read_bytes(path, most=len(CONTENT) - 1)
    assert error.value.reason == "bytes"


@pytest.mark.skipif(not OPEN.is_dir(), reason="needs the list of /proc")
def test_no_descriptor_stays_open(path, tmp_path):
    (tmp_path / "folder").mkdir()
    gc.collect()  # or what earlier tests left is closed meanwhile
    before = sorted(OPEN.iterdir())
    for _ in range(3):
        read_bytes(path)
        with open_file(path) as (file, _):
            assert file.read(2) == CONTENT[:2]
        with pytest.raises(RecordError), open_file(path):
            raise OSError(5, "Input/output error")
        for bad, reason in ((tmp_path / "folder", "not_a_file"), (tmp_path / "none", "missing")):
            with pytest.raises(RecordError) as error:
                read_bytes(bad)
            assert error.value.reason == reason
    assert sorted(OPEN.iterdir()) == before
