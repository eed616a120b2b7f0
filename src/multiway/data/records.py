"""What every reader of raw data shares: a record as it was found, a fault, and ways to read bytes and text safely."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from multiway.errors import RecordError

MAX_LINE = 16 * 2**20
"""Longest line of a table and longest document of a text file, in bytes."""
MAX_CAPTION_FILE = 2**20
"""Largest caption, label or JSON file that belongs to one picture, in bytes."""

HASH_BYTES = 16
IMAGE_FIELDS = ("image", "image_path")
TEXT_FIELDS = ("text", "caption", "captions")
NO_GOLD = "no_gold"
"""Reason of a record that is left out because the people who labelled it did not agree."""
MESSAGE_CHARS = 300
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
READ_TRIES = 3
RETRY_SECONDS = 0.05
FLAKY = frozenset((errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN))
REASONS = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.ELOOP: "not_a_file",
    errno.EISDIR: "not_a_file",
    errno.ENXIO: "not_a_file",
}


class Where(NamedTuple):
    """Where a record was found: ``file`` relative to its root, ``line`` from 1, byte ``offset`` and length, or None."""

    source: str
    file: str
    key: str
    line: int | None = None
    offset: int | None = None
    bytes: int | None = None


class Span(NamedTuple):
    """Where a picture's bytes lie: a path below the root, as found; ``length`` None = the whole file."""

    file: str
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Record:
    """One record as found: only its types are checked, and its picture is not opened yet."""

    where: Where
    root: Path
    image: Span | None = None
    texts: tuple[str, ...] = ()
    label: str | None = None

    @property
    def kind(self) -> str:
        """``pair``, ``image`` or ``text``."""
        return "text" if self.image is None else "pair" if self.texts else "image"


@dataclass(frozen=True)
class Example:
    """One labelled record of a task as found: its pictures, its texts and what people answered, in their order.

    ``where.key``: its official number or name, which predictions are given under; ``answers``: as written; () = none.
    """

    where: Where
    root: Path
    images: tuple[Span, ...] = ()
    texts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``example``."""
        return "example"


@dataclass(frozen=True)
class Fault:
    """One bad record; or with ``shard`` set one damaged file, of which what lies behind ``where`` is lost.

    ``stage``: ``read``, ``parse``, ``validate`` or ``decode``; ``reason``: a short code for counting.
    """

    where: Where
    stage: str
    reason: str
    message: str
    shard: bool = False

    @classmethod
    def of(cls, error: RecordError, where: Where, stage: str) -> Fault:
        """The fault that an error at a place is."""
        return cls(where, stage, error.reason, str(error)[:MESSAGE_CHARS])

    def row(self) -> dict[str, Any]:
        """The quarantine line, as a plain dict."""
        scope = "shard" if self.shard else "record"
        rest = {"scope": scope, "stage": self.stage, "reason": self.reason, "message": self.message}
        return {**self.where._asdict(), **rest}

    def __str__(self) -> str:
        where = self.where
        key = "" if where.key.startswith(where.file) else f" {where.key}"
        line = "" if where.line is None else f", line {where.line}"
        offset = "" if where.offset is None else f", byte {where.offset}"
        return f"{where.file}{key}{line}{offset}: {self.message} [{self.reason}]"


class Ignored(NamedTuple):
    """A file or shard member that no rule reads."""

    file: str


class Fingerprint(NamedTuple):
    """What tells that a file is no longer the one that was indexed."""

    size: int
    mtime_ns: int


class Content(NamedTuple):
    """Bytes of a file, its fingerprint while it was open, and how many reads failed before this one."""

    data: bytes
    fingerprint: Fingerprint
    retries: int


def inside(root: Path, name: str) -> str:
    """Resolve a path out of a record: relative to ``root`` (resolved), which neither ``..`` nor links may leave.

    Raises RecordError (``path``).
    """
    try:
        parts = PurePosixPath(name).parts
        if parts and parts[0] != "/" and ".." not in parts:
            return (root / name).resolve().relative_to(root).as_posix()
    except (OSError, ValueError, RuntimeError):  # too long; outside, NUL or not encodable; a loop of links
        pass
    raise RecordError(f"path {name!r} is not one of a file below {root}", reason="path")


@contextmanager
def open_file(path: Path) -> Iterator[tuple[BinaryIO, Fingerprint]]:
    """Open a regular file for reading, refusing links, folders, devices and pipes.

    Raises RecordError (``missing``, ``permission``, ``not_a_file``, ``io``), for reads inside the block too.
    """
    try:
        number, fingerprint = _open_regular(path)
        with open(number, "rb") as file:
            yield file, fingerprint
    except OSError as error:
        raise _unreadable(path, error) from error


def _open_regular(path: Path) -> tuple[int, Fingerprint]:
    """Descriptor and fingerprint of a file; raises OSError, and RecordError (``not_a_file``)."""
    number = os.open(path, OPEN_FLAGS)
    try:
        status = os.fstat(number)
        if stat.S_ISREG(status.st_mode):
            return number, Fingerprint(status.st_size, status.st_mtime_ns)
        raise RecordError(f"{path} is not a regular file", reason="not_a_file")
    except BaseException:
        os.close(number)
        raise


def _unreadable(path: Path, error: OSError) -> RecordError:
    return RecordError(f"cannot read {path}: {error.strerror}", reason=REASONS.get(error.errno or 0, "io"))


def read_bytes(path: Path, offset: int = 0, length: int | None = None, *, most: int | None = None) -> Content:
    """Read ``length`` bytes (None = all, which must not be more than ``most``) of a regular file.

    Transient errors of the storage are tried again, with growing pauses; fewer bytes may come back from a file that
    has become shorter. Raises RecordError as `open_file`, and ``bytes``.
    """
    for attempt in range(READ_TRIES):
        try:
            return Content(*_read_once(path, offset, length, most), attempt)
        except RecordError as error:
            flaky = isinstance(error.__cause__, OSError) and error.__cause__.errno in FLAKY
            if not flaky or attempt + 1 == READ_TRIES:
                raise
            time.sleep(RETRY_SECONDS * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _read_once(path: Path, offset: int, length: int | None, most: int | None) -> tuple[bytes, Fingerprint]:
    try:
        number, fingerprint = _open_regular(path)
        try:
            if length is None and most is not None and fingerprint.size > most:
                raise RecordError(f"{path} has {fingerprint.size} bytes, at most {most} are allowed", reason="bytes")
            room = max(0, fingerprint.size - offset)
            wanted = room if length is None else min(length, room)
            data = os.pread(number, wanted, offset)
            while len(data) < wanted and (more := os.pread(number, wanted - len(data), offset + len(data))):
                data += more
            return data, fingerprint
        finally:
            os.close(number)
    except OSError as error:
        raise _unreadable(path, error) from error


def content_hash(data: bytes) -> bytes:
    """BLAKE2b of HASH_BYTES bytes: what tells two pictures apart."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def utf8(data: bytes) -> str:
    """Decode strict UTF-8, a byte-order mark in front allowed. Raises RecordError (``utf8``)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = data[error.start : error.start + 4]
        raise RecordError(f"not UTF-8 at byte {error.start} of the text: {found!r}", reason="utf8") from error


def encodable(text: str) -> bool:
    """Whether a text has no lone surrogates, which are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(data: bytes, shrink: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """Parse one JSON object.

    ``shrink``: what is kept of every object in it, inner ones first, so that a large file needs little memory.
    Raises RecordError: ``utf8``, ``json``, ``duplicate_field``, ``not_finite``, ``type``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RecordError(f"field {twice!r} occurs more than once", reason="duplicate_field")
        return fields if shrink is None else shrink(fields)

    def finite(literal: str) -> None:
        raise RecordError(f"{literal} is not JSON", reason="not_finite")

    try:
        value = json.loads(utf8(data), object_pairs_hook=unique, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}", reason="json") from error
    if not isinstance(value, dict):
        raise RecordError(f"expected an object, found {type(value).__name__}", reason="type")
    return value


def parse_fields(fields: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...], str | None]:
    """Image path, texts and label of an object or table row; null or absent fields are None or ().

    Raises RecordError (``type``) naming the field.
    """
    images = [(name, fields[name]) for name in IMAGE_FIELDS if fields.get(name) is not None]
    texts: list[tuple[str, Any]] = []
    for name in TEXT_FIELDS:
        value = fields.get(name)
        if isinstance(value, list):
            texts += [(f"{name}[{i}]", x) for i, x in enumerate(value)] or [(name, "")]
        elif value is not None:
            texts.append((name, value))
    for name, value in (*images, *texts):
        if not isinstance(value, str):
            raise RecordError(f"field {name}: expected text, found {type(value).__name__}", reason="type")
    label = fields.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
        found = type(label).__name__
        raise RecordError(f"field label: expected text or a whole number, found {found}", reason="type")
    return images[0][1] if images else None, tuple(x for _, x in texts), None if label is None else str(label)
