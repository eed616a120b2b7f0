"""Zip archives of stored records, walked strictly: every byte of the file is a record's or the directory's.

Nothing is unpacked and nothing is inflated, so reading takes no more memory than the file has bytes; two programs
cannot see two different archives in one file. Records that nobody reads may be compressed.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from multiway.errors import ConversionError

MAX_RECORDS = 100_000
"""More records than any published model has tensors."""
MAX_DIRECTORY = 32 * 2**20
CHUNK = 2**20

LOCAL, CENTRAL = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L")
END, END_64, LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
FULL = 0xFFFFFFFF
"""A size or offset that is written in the 64-bit extra field instead."""
DESCRIPTOR_FOLLOWS, UTF_8 = 0x8, 0x800
DEFLATED = 8
DESCRIPTOR = 24
"""Longest form of a record's CRC and sizes behind it, in bytes."""


class Record(NamedTuple):
    """Where a record's bytes lie, how many there are, and their CRC-32, None for those of a compressed one."""

    offset: int
    size: int
    crc: int | None


class _Entry(NamedTuple):
    """A row of the directory."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int


class Archive:
    """The records of a zip file by name, all of them stored, but for those named like ``unread``, which cannot be read.

    Raises ConversionError for a file that is cut short, has compressed, encrypted, repeated or too many records, or
    bytes that belong to none.
    """

    def __init__(self, path: Path, file: BinaryIO, unread: re.Pattern[str]) -> None:
        self.path = path
        self._file = file
        self._unread = unread
        self.size = file.seek(0, 2)
        self.records: dict[str, Record] = {}
        start, length = self._directory()
        entries = sorted(self._entries(self._bytes(start, length)), key=lambda entry: entry.offset)
        ends = [*(entry.offset for entry in entries), start][1:]
        place = 0
        for entry, end in zip(entries, ends, strict=True):
            name = _shown(entry.name)
            if entry.offset != place:
                raise self._wrong(f"{place - entry.offset} bytes before {name} belong to another record or to none")
            if name in self.records:
                raise self._wrong(f"{name} is there twice")
            self.records[name] = self._record(entry, end)
            place = end
        if place != start:
            raise self._wrong(f"{start - place} bytes before its directory belong to no record")

    def check(self) -> None:
        """Compare every stored record with its CRC. Raises ConversionError naming the first that differs."""
        for name, record in self.records.items():
            if record.crc is None:
                continue
            self._file.seek(record.offset)
            crc, left = 0, record.size
            while left:
                chunk = self._file.read(min(left, CHUNK))
                if not chunk:
                    raise self._wrong(f"{name} is cut short")
                crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            if crc != record.crc:
                raise self._wrong(f"{name} does not have the checksum written down for it")

    def read(self, name: str) -> bytearray:
        """All bytes of a record."""
        record = self.records[name]
        assert not self._unread.fullmatch(name), "these are not read"
        content = bytearray(record.size)
        self._file.seek(record.offset)
        if self._file.readinto(content) != record.size:  # type: ignore[attr-defined]  typing's BinaryIO lacks it
            raise self._wrong(f"{name} is cut short")
        return content

    def _directory(self) -> tuple[int, int]:
        """Where the directory begins and its length; what lies behind it must be the end of the file."""
        tail = END.size
        if self.size < tail:
            raise self._wrong("no directory at its end: it is cut short")
        mark, _, _, _, count, length, start, comment = END.unpack(self._bytes(self.size - tail, tail))
        if mark != b"PK\5\6" or comment:
            raise self._wrong("no directory at its end: it is cut short, or something was appended")
        longer = tail + LOCATOR.size + END_64.size
        if self.size >= longer:
            here = self.size - longer
            wide = END_64.unpack(self._bytes(here, END_64.size))
            mark, _, place, _ = LOCATOR.unpack(self._bytes(here + END_64.size, LOCATOR.size))
            if mark == b"PK\6\7" and wide[0] == b"PK\6\6" and place == here:
                tail, (count, length, start) = longer, wide[-3:]
        if count > MAX_RECORDS or length > MAX_DIRECTORY:
            raise self._wrong(f"{count} records in a directory of {length} bytes, more than the {MAX_RECORDS} allowed")
        if start + length + tail != self.size:
            raise self._wrong(f"its parts make {start + length + tail} bytes, the file has {self.size}: it is damaged")
        return start, length

    def _entries(self, directory: bytes) -> Iterator[_Entry]:
        place = 0
        while place < len(directory):
            head = directory[place : place + CENTRAL.size]
            if len(head) < CENTRAL.size or head[:4] != b"PK\1\2":
                raise self._wrong(f"its directory is damaged at byte {place}")
            (_, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, _, _, _, offset) = CENTRAL.unpack(
                head
            )
            place += CENTRAL.size
            name, more = directory[place : place + named], directory[place + named : place + named + extra]
            place += named + extra + comment
            size, packed, offset = _wide(more, size, packed, offset)
            stored = not method and size == packed
            unread = method == DEFLATED and self._unread.fullmatch(_shown(name))
            if flags & ~(DESCRIPTOR_FOLLOWS | UTF_8) or not (stored or unread):
                raise self._wrong(f"{_shown(name)} is compressed or encrypted; save the file again without that")
            yield _Entry(name, flags, method, crc, packed, size, offset)

    def _record(self, entry: _Entry, end: int) -> Record:
        """Where an entry's bytes are; header, bytes and perhaps a descriptor must reach exactly to ``end``."""
        name = _shown(entry.name)
        head = self._bytes(entry.offset, LOCAL.size)
        if len(head) < LOCAL.size or head[:4] != b"PK\3\4":
            raise self._wrong(f"no header of {name} at byte {entry.offset}")
        _, _, flags, method, _, _, _, packed, size, named, extra = LOCAL.unpack(head)
        offset = entry.offset + LOCAL.size + named + extra
        again = self._bytes(entry.offset + LOCAL.size, named)
        same = again == entry.name and (flags, method) == (entry.flags, entry.method)
        if not same or packed not in (0, FULL, entry.packed) or size not in (0, FULL, entry.size):
            raise self._wrong(f"the header of {name} is not what the directory says")
        behind = end - offset - entry.packed
        ends = [struct.pack(form, b"PK\7\x08", entry.crc, entry.packed, entry.size) for form in _descriptors(entry)]
        if behind and (not 0 < behind <= DESCRIPTOR or self._bytes(end - behind, behind) not in ends):
            raise self._wrong(f"{name} has {entry.packed} bytes in the directory and {end - offset} in the file")
        return Record(offset, entry.packed, None if entry.method else entry.crc)

    def _bytes(self, offset: int, count: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(count)

    def _wrong(self, what: str) -> ConversionError:
        return ConversionError(f"{self.path}: {what}; fetch it again from where it was published")


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """Sizes and offset, from the 64-bit extra field where they are too large for the directory's row."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra[4 : 4 + length].ljust(length, b"\0")))
            return tuple(next(wide, FULL) if value == FULL else value for value in values)
        extra = extra[4 + length :]
    return values


def _descriptors(entry: _Entry) -> list[str]:
    """The forms in which a record's CRC and sizes may follow it."""
    if not entry.flags & DESCRIPTOR_FOLLOWS:
        return []
    return ["<4sLQQ"] if max(entry.packed, entry.size) >= FULL else ["<4s3L", "<4sLQQ"]


def _shown(name: bytes) -> str:
    """A record's name; what cannot be printed is escaped."""
    text = name.decode(errors="backslashreplace")
    return text if text.isprintable() else ascii(text)
