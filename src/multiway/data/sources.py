"""Raw records of images, texts and pairs: what users have on disk, enumerated without trusting any of it.

Readers yield a `Record` for everything that looks like one and a
`Fault` for everything that does not; they open no picture. `discover` decides
what a path holds:

- ``*.jsonl``: one object a line: ``image`` (or ``image_path``), ``text`` | ``caption`` | ``captions`` (text or a list
  of texts), ``label``;
- ``*.csv``, ``*.tsv``: the first line names the columns, out of the same names; an empty cell is an absent field. CSV
  has quotes, TSV has none;
- ``*.tar``: shards in webdataset's format (`multiway.data.shards`);
- any other file named directly: plain text, documents separated by blank lines;
- a folder: its ``.jsonl``, ``.csv``, ``.tsv`` and ``.tar`` files, if there are any; otherwise its pictures at any
  depth, the first folder below the root being the label, ``name.txt`` beside ``name.jpg`` holding its captions, one a
  line, and other ``.txt`` files being plain text;
- a folder with several of ``train.jsonl``, ``val-000.tar``, ``test/`` ... needs a ``split``.

With an image and a text a record is a ``pair``, otherwise an ``image`` or a ``text``. Other fields and columns are not
read; files that are not read are counted. Paths in tables are relative to the table's folder, which neither ``..`` nor
links may leave. Text is strict UTF-8.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from multiway.data import shards
from multiway.data.records import (
    IMAGE_FIELDS,
    MAX_CAPTION_FILE,
    MAX_LINE,
    TEXT_FIELDS,
    Example,
    Fault,
    Ignored,
    Record,
    Span,
    Where,
    encodable,
    inside,
    open_file,
    parse_fields,
    parse_json,
    read_bytes,
    utf8,
)
from multiway.errors import ConfigError, DataError, MissingInputError, RecordError

FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tar": "tar"}
SPLITS = ("train", "val", "valid", "validation", "dev", "test")
LOST_LINE = "\udc00"  # what stands for a line that is too long; no text decodes to it
BOM = b"\xef\xbb\xbf"

Item = Record | Example | Fault | Ignored
Row = tuple[Where, dict[str, Any]]


@dataclass(frozen=True)
class RawSource:
    """One source to be read: iterating yields its items, each time anew and in the same order.

    ``format``: ``jsonl``, ``csv``, ``tsv``, ``tar``, ``text`` or ``tree``; ``root``: resolved, no path may leave it;
    ``files``: below the root, in order; empty for a tree, whose files are found while reading.
    """

    name: str
    format: str
    root: Path
    files: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Item]:
        if self.format == "tree":
            return _read_tree(self)
        if self.format == "tar":
            return shards.read(self.name, self.root, self.files)
        return (item for file in self.files for item in _read_file(self, file))


def discover(root: Path | str, split: str | None = None) -> list[RawSource]:
    """The sources a path holds, by the rules of this module.

    ``split``: which of ``train.jsonl``, ``val-000.tar``, ``test/`` ... to take. None = all, when there are not several.

    Raises MissingInputError without such a path or split, ConfigError when a split must be chosen.
    """
    root = Path(root)
    if not root.exists():
        raise MissingInputError(f"{root}: no such file or folder")
    root = root.resolve()
    if root.is_file():
        return [RawSource(root.stem, FORMATS.get(root.suffix.lower(), "text"), root.parent, (root.name,))]
    entries = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    splits = {name: [p for p in entries if _is_split(p, name)] for name in dict.fromkeys([*SPLITS, split or "train"])}
    present = [name for name, found in splits.items() if found]
    if split is not None:
        if split not in present:
            raise MissingInputError(f"{root} has no split {split!r}, only {present or 'none'}")
        entries = splits[split]
        if entries[0].is_dir():
            return [RawSource(split, s.format, s.root, s.files) for s in discover(entries[0])]
    elif len(present) > 1:
        raise ConfigError(f"{root} has the splits {', '.join(present)}: choose one")
    return _sources(root, entries, split) or [RawSource(root.name, "tree", root)]


def _is_split(path: Path, name: str) -> bool:
    """Whether a folder or table is named after a split: ``train``, ``train-000.tar``, ``train_1.jsonl``."""
    stem = path.name if path.is_dir() else path.stem if path.suffix.lower() in (*FORMATS, ".txt") else ""
    return stem == name or (not path.is_dir() and stem.startswith((f"{name}-", f"{name}_")))


def _sources(root: Path, entries: list[Path], split: str | None) -> list[RawSource]:
    """The tables, shards and (of a split) texts among a folder's entries; all shards are one source."""
    files = [p for p in entries if p.is_file()]
    tables = [p for p in files if FORMATS.get(p.suffix.lower(), "tar") != "tar" or (split and p.suffix == ".txt")]
    sources = [RawSource(p.stem, FORMATS.get(p.suffix.lower(), "text"), root, (p.name,)) for p in tables]
    tars = tuple(p.name for p in files if p.suffix.lower() == ".tar")
    return [*sources, RawSource(split or root.name, "tar", root, tars)] if tars else sources


def _read_file(source: RawSource, file: str, form: str = "") -> Iterator[Item]:
    """The items of one table or text; a file that cannot be read to its end is a fault itself."""
    read = _read_text if (form or source.format) == "text" else _read_rows
    try:
        yield from read(source, file)
    except RecordError as error:
        yield Fault.of(error, Where(source.name, file, file), "read")


# ------------------------------------------------------------------------------------------------------------ tables


class Line(NamedTuple):
    """A line of a file: number from 1, byte offset, length in bytes, and its bytes, None when it is too long."""

    number: int
    offset: int
    length: int
    data: bytes | None


def lines(path: Path) -> Iterator[Line]:
    """Lines of a file in bounded memory, without a byte-order mark. Raises RecordError as ``open_file``."""
    with open_file(path) as (file, _):
        offset = number = 0
        while data := file.readline(MAX_LINE + 1):
            number += 1
            length, end = len(data), data[-1:]
            while end != b"\n" and (more := file.readline(MAX_LINE)):
                length, end = length + len(more), more[-1:]
            start = BOM if offset == 0 else b""
            yield Line(number, offset, length, data.removeprefix(start) if length <= MAX_LINE else None)
            offset += length


def _too_long(line: Line) -> RecordError:
    return RecordError(f"line of {line.length} bytes, at most {MAX_LINE} are allowed", reason="line_too_long")


def _read_rows(source: RawSource, file: str) -> Iterator[Item]:
    known = (*IMAGE_FIELDS, *TEXT_FIELDS)
    for row in jsonl_rows(source, file) if source.format == "jsonl" else table_rows(source, file, known):
        if isinstance(row, Fault):
            yield row
            continue
        where, fields = row
        try:
            yield _record(source, where, *parse_fields(fields))
        except RecordError as error:
            yield Fault.of(error, where, "parse")


def jsonl_rows(source: RawSource, file: str) -> Iterator[Row | Fault]:
    """Place and object of every line of a JSONL file; raises RecordError when it cannot be read to its end."""
    for line in lines(source.root / file):
        where = Where(source.name, file, f"{file}:{line.number}", line.number, line.offset, line.length)
        try:
            if line.data is None:
                raise _too_long(line)
            if line.data.strip():
                yield where, parse_json(line.data)
        except RecordError as error:
            yield Fault.of(error, where, "parse")


def table_rows(
    source: RawSource, file: str, known: Collection[str], columns: Sequence[str] = ()
) -> Iterator[Row | Fault]:
    """Place and cells of every row of a CSV or TSV, None for empty cells.

    A broken quote is one fault, and may take the lines up to the next quote with it. ``columns``: their names; () = the
    first line says them, and DataError is raised unless one of ``known`` is among them. Raises RecordError when the
    file cannot be read to its end.
    """
    at = Line(0, 0, 0, b"")

    def text() -> Iterator[str]:
        nonlocal at
        for at in lines(source.root / file):
            # Bytes that are not UTF-8 become lone surrogates, which are found row by row.
            yield LOST_LINE if at.data is None else at.data.decode("utf-8", "surrogateescape")

    rows = (
        csv.reader(text(), strict=True)
        if source.format == "csv"
        else csv.reader(text(), delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    columns = columns or _columns(source, file, rows, known)
    while True:
        begin, offset = at.number + 1, at.offset + at.length
        try:
            row, broken = next(rows), None
        except StopIteration:
            return
        except csv.Error as error:
            row, broken = [], f"lines {begin} to {at.number} are not {source.format.upper()}: {error}"
        where = Where(source.name, file, f"{file}:{begin}", begin, offset, at.offset + at.length - offset)
        try:
            if broken:
                raise RecordError(broken, reason="csv")
            if row == [LOST_LINE]:
                raise _too_long(at)
            if row:
                yield where, _cells(row, columns)
        except RecordError as error:
            yield Fault.of(error, where, "parse")


def _columns(source: RawSource, file: str, rows: Iterator[list[str]], known: Collection[str]) -> list[str]:
    """The names in a table's first line. Raises DataError unless one of ``known`` is there, each once."""
    try:
        columns = [name.strip() for name in next(rows, [])]
    except csv.Error:
        columns = []
    if not set(columns) & set(known) or len(set(columns)) < len(columns):
        found = ", ".join(columns)[:200]
        raise DataError(
            f"{source.root / file}: the first line must name the columns, each once, one of {', '.join(known)} among "
            f"them; found {found!r}"
        )
    return columns


def _cells(row: list[str], columns: Sequence[str]) -> dict[str, str | None]:
    """A row as fields. Raises RecordError: ``fields``, ``utf8``."""
    if len(row) != len(columns):
        raise RecordError(f"row of {len(row)} fields, expected {len(columns)}: {', '.join(columns)}", reason="fields")
    for name, cell in zip(columns, row, strict=True):
        if not encodable(cell):
            raise RecordError(f"column {name}: not UTF-8: {cell[:40]!r}", reason="utf8")
    return {name: cell or None for name, cell in zip(columns, row, strict=True)}


def _record(source: RawSource, where: Where, image: str | None, texts: tuple[str, ...], label: str | None) -> Record:
    """A table row as a record. Raises RecordError: ``schema``, ``path``."""
    if image is None and not texts:
        fields = f"an image ({', '.join(IMAGE_FIELDS)}) nor a text ({', '.join(TEXT_FIELDS)})"
        raise RecordError(f"neither {fields}", reason="schema")
    if image is None:
        return Record(where, source.root, texts=texts, label=label)
    return Record(where._replace(key=image), source.root, Span(inside(source.root, image)), texts, label)


# ------------------------------------------------------------------------------------------- plain text and pictures


def _read_text(source: RawSource, file: str) -> Iterator[Item]:
    for number, offset, data in _documents(source.root / file):
        where = Where(source.name, file, f"{file}:{number}", number, offset, len(data))
        try:
            yield Record(where, source.root, texts=(utf8(data),))
        except RecordError as error:
            yield Fault.of(error, where, "parse")


def _documents(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """First line, byte offset and bytes of every document; what is longer than MAX_LINE comes in pieces."""
    first = start = 0
    document: list[bytes] = []
    size = 0
    for number, offset, line in _pieces(path):
        if document and (not line.strip() or size + len(line) > MAX_LINE):
            yield first, start, b"".join(document)
            document, size = [], 0
        if line.strip():
            first, start = (first, start) if document else (number, offset)
            document.append(line)
            size += len(line)
    if document:
        yield first, start, b"".join(document)


def _pieces(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number, byte offset and bytes of every line; long ones come in pieces, cut between characters."""
    with open_file(path) as (file, _):
        number, offset = 1, 0
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                back = next((n for n in range(1, 5) if line[-n] & 0xC0 != 0x80), 0)
                line = line[: MAX_LINE - back]
                file.seek(offset + len(line))
            yield number, offset, line
            number += line.endswith(b"\n")
            offset += len(line)


def _read_tree(source: RawSource) -> Iterator[Item]:
    """Pictures with their captions, and other texts, folder by folder in the order of their names."""
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(source.root, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = Path(folder).relative_to(source.root)
        pictures = {PurePosixPath(name).stem for name in names if _is_picture(name)}
        for name in sorted(names):
            file = (inner / name).as_posix()
            if _is_picture(name):
                yield _picture(source, file, beside=f"{PurePosixPath(name).stem}.txt" in names)
            elif not name.endswith(".txt") or name.startswith("."):
                yield Ignored(file)
            elif PurePosixPath(name).stem not in pictures:
                yield from _read_file(source, file, "text")
    for error in unreadable:
        where = Where(source.name, str(error.filename), str(error.filename))
        yield Fault(where, "read", "permission", f"cannot read the folder: {error.strerror}", shard=True)


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in shards.IMAGE_PARTS and not name.startswith(".")


def _picture(source: RawSource, file: str, *, beside: bool) -> Item:
    """A picture of a tree, with the captions that lie beside it."""
    path = PurePosixPath(file)
    where = Where(source.name, file, file)
    label = path.parts[0] if len(path.parts) > 1 else None
    try:
        span = Span(inside(source.root, file))
        captions = path.with_suffix(".txt")
        if not beside:
            return Record(where, source.root, span, label=label)
        data = read_bytes(source.root / inside(source.root, str(captions)), most=MAX_CAPTION_FILE).data
        return Record(where, source.root, span, shards.caption_lines(data), label)
    except RecordError as error:
        return Fault.of(error, where, "read")
