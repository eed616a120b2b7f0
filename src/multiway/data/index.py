"""Building an index: the trust boundary of all data, passed by every record once.

`build` reads, checks, hashes and measures all records (`multiway.data.scan`) and writes what
`Index` opens: nothing else is trained on. What is bad is listed in
``quarantine.jsonl``: seen = indexed + quarantined.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multiway.data import annotations, columns
from multiway.data.columns import Columns, Table, string
from multiway.data.image import DEFAULT_LIMITS, Limits
from multiway.data.indexed import FORMAT, Index, Source, describe, digest, overlap
from multiway.data.records import HASH_BYTES, Example, Fingerprint
from multiway.data.scan import Measured, Report, scan
from multiway.data.sources import RawSource, discover
from multiway.data.text import TextTokenizer
from multiway.errors import ConfigError, DataError, WriteError

__all__ = ["Index", "Report", "Source", "build", "check", "describe", "overlap"]

CHUNK = 4096  # texts tokenized at once
UNKNOWN_SHARE = 0.05  # of the tokens, above which a source is warned of
PICTURE = {"file": ("<i4",), "offset": ("<i8",), "length": ("<i8",), "width": ("<i4",), "height": ("<i4",)}
PICTURE |= {"hash": ("u1", HASH_BYTES), "label": ("<i4",), "key": ("u1",), "key_end": ("<i8",)}
STRINGS = {"string": ("u1",), "string_end": ("<i8",)}
CAPTIONS = STRINGS | {"caption_end": ("<i8",)}
ANSWERS = {"picture_end": ("<i8",), "answer": ("<i4",), "answer_end": ("<i8",)}
SEEN = {name: row for name, row in PICTURE.items() if name != "label"}
LAYOUTS = {"image": PICTURE, "pair": PICTURE | CAPTIONS, "text": STRINGS, "example": SEEN | CAPTIONS | ANSWERS}
TOKENS = {"token": ("<i4",), "token_end": ("<i8",)}
FILES = {"name": ("u1",), "name_end": ("<i8",), "root": ("<i4",), "size": ("<i8",), "mtime_ns": ("<i8",)}

logger = logging.getLogger(__name__)
Roots = Path | str | Sequence[Path | str]


def build(
    roots: Roots,
    out: Path | str,
    *,
    split: str | None = None,
    task: str | None = None,
    tokenizer: TextTokenizer | None = None,
    vocab: int = 8192,
    window: int = 512,
    limits: Limits = DEFAULT_LIMITS,
    missing: str = "count",
    max_bad_fraction: float = 0.01,
    max_bad_shards: float = 0.1,
    workers: int = 0,
    progress: bool = True,
) -> Index:
    """Read every record of ``roots`` once and write the index ``out``, whole or not at all; an older one is replaced.

    ``roots``: a file or folder, or several, read as `multiway.data.sources` says; ``split``: the part named so.
    ``task``: ``vqa``, ``nlvr2``, ``entailment`` or ``text_classification`` = read labelled examples of it, as
    `multiway.data.annotations` says; None = pictures and texts to train on.
    ``tokenizer``: None = train one of ``vocab`` ids on the texts. ``window``: longest run of text-only tokens with its
    two specials: documents are joined by ``</s>`` and cut every ``window - 2`` ids, wherever a sentence ends.
    ``missing``: ``"count"`` = a picture that is not there is a bad record, ``"skip"`` = it is listed all the same, but
    any number may be missing. ``max_bad_fraction``, ``max_bad_shards``: largest shares of bad records and damaged
    shards. ``workers``: processes that decode, 0 = this one; the result does not depend on it.

    Raises DataError beyond those shares or when nothing is good, after writing ``OUT.rejected/quarantine.jsonl``;
    MissingInputError without the root; ConfigError for a setting or when ``out`` is there and no index; WriteError
    when the disk refuses.
    """
    out = Path(out)
    sources = _sources(roots, split, missing, task)
    if window < 3 or (out.exists() and not (out / "manifest.json").is_file()):
        problem = f"a window of {window} ids" if window < 3 else f"{out}, which is there and is no index"
        raise ConfigError(f"cannot write an index with {problem}: expected a window of 3 or more and a new folder")
    report = Report(missing_counts=missing == "count")
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    rejected = out.with_name(f"{out.name}.rejected")
    try:
        temporary.mkdir(parents=True)
        writer = _Writer(temporary, task)
        for source, measured in scan(sources, report, limits=limits, workers=workers, progress=progress):
            writer.add(source, measured)
        shutil.rmtree(rejected, ignore_errors=True)
        _write_rows(temporary / "quarantine.jsonl", report)
        try:
            report.require(max_bad_fraction, max_bad_shards)
        except DataError as error:
            rejected.mkdir()
            (temporary / "quarantine.jsonl").rename(rejected / "quarantine.jsonl")
            raise DataError(f"{error}\nAll are listed in {rejected}: repair or remove them and index again") from None
        writer.finish(tokenizer, vocab, window, limits, report)
        _replace(out, temporary)
    except OSError as error:
        raise WriteError(f"cannot write the index {out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Index.open(out)


def check(
    roots: Roots,
    *,
    split: str | None = None,
    task: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    missing: str = "count",
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """The pass that `build` makes, without writing anything: what is there, and every fault."""
    report = Report(missing_counts=missing == "count")
    for _ in scan(_sources(roots, split, missing, task), report, limits=limits, workers=workers, progress=progress):
        pass
    return report


def _sources(roots: Roots, split: str | None, missing: str, task: str | None) -> list[RawSource]:
    """The raw sources of all roots, under names that occur once."""
    if missing not in ("count", "skip"):
        raise ConfigError(f"missing={missing!r}: expected 'count' or 'skip'")
    folders = [roots] if isinstance(roots, (str, Path)) else roots
    found: list[RawSource] = []
    for root in folders:
        found += discover(root, split) if task is None else annotations.discover(root, task, split)
    names: dict[str, int] = {}
    for i, source in enumerate(found):
        names[source.name] = names.get(source.name, 0) + 1
        if names[source.name] > 1:
            found[i] = dataclasses.replace(source, name=f"{source.name}-{names[source.name]}")
    return found


def _write_rows(path: Path, report: Report) -> None:
    """One line for every fault."""
    with open(path, "w", encoding="ascii") as file:
        file.writelines(json.dumps(fault.row()) + "\n" for fault in report.faults)


def _replace(out: Path, temporary: Path) -> None:
    """Put a finished folder in the place of ``out`` by renaming, once all of it is on the disk."""
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    old = temporary.with_name(f"{temporary.name}-old")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class _Writer:
    """An index being written: one table per source and kind, and one of all files."""

    def __init__(self, folder: Path, task: str | None) -> None:
        self.folder, self.task = folder, task
        self.parts: dict[tuple[str, str], tuple[RawSource, Table]] = {}
        self.files = Table(folder, "files", FILES)
        self.numbers: dict[tuple[Path, str], int] = {}
        self.roots: list[Path] = []
        self.labels: dict[str, int] = {}

    def add(self, source: RawSource, good: Measured) -> None:
        """Append a good record."""
        kind = good.record.kind
        if (source.name, kind) not in self.parts:
            table = Table(self.folder, str(len(self.parts)), LAYOUTS[kind])
            self.parts[source.name, kind] = source, table
        table = self.parts[source.name, kind][1]
        for picture in good.pictures:
            table.add(
                file=self._file(good.record.root, picture.span.file, picture.fingerprint),
                offset=picture.span.offset,
                length=picture.span.length or 0,
                width=picture.size[0],
                height=picture.size[1],
                hash=np.frombuffer(picture.hash, np.uint8),
            )
        if kind != "text":
            table.add_strings("key", [good.record.where.key])
        if good.texts:
            table.add_strings("string", good.texts)
        if "caption_end" in table.columns:
            table.add(caption_end=table.columns["string_end"].rows)
        if isinstance(good.record, Example):
            table.columns["answer"].extend([self._label(answer) for answer in good.record.answers])
            table.add(answer_end=table.columns["answer"].rows, picture_end=table.columns["file"].rows)
        elif "label" in table.columns:
            table.add(label=-1 if good.record.label is None else self._label(good.record.label))

    def _label(self, name: str) -> int:
        """Number of a label, in the order they were found in."""
        return self.labels.setdefault(name, len(self.labels))

    def _file(self, root: Path, name: str, fingerprint: Fingerprint) -> int:
        """Number of a picture's file, with the fingerprint it had when it was first read."""
        if (root, name) not in self.numbers:
            if root not in self.roots:
                self.roots.append(root)
            self.numbers[root, name] = len(self.numbers)
            self.files.add_strings("name", [name])
            self.files.add(root=self.roots.index(root), size=fingerprint.size, mtime_ns=fingerprint.mtime_ns)
        return self.numbers[root, name]

    def finish(self, tokenizer: TextTokenizer | None, vocab: int, window: int, limits: Limits, report: Report) -> None:
        """Tokenize, number the labels in order, and write the manifest."""
        entries = [table.close() for _, table in self.parts.values()]
        texts = [self._strings(entry) for entry in entries]
        if any(texts):
            tokenizer = tokenizer or TextTokenizer.train(_all_strings(texts), vocab)
            tokenizer.save(self.folder / "tokenizer.json")
        labels = _sorted_labels(self.labels)
        places = {label: i for i, label in enumerate(labels)}
        rank = np.array([places[label] for label in self.labels] + [-1], "<i4")  # -1, no label, stays
        sources = []
        for number, ((name, kind), (source, _)) in enumerate(self.parts.items()):
            files = entries[number]
            row: dict[str, Any] = {"name": name, "kind": kind, "format": source.format}
            row["records"] = report.indexed[name, kind]
            if tokenizer is not None and texts[number]:
                more, row["tokens"], row["unknown_tokens"] = self._tokenize(number, kind, texts[number], tokenizer)
                files |= more
                _warn_of_unknown(row)
            if kind == "text":
                for column in STRINGS:
                    (self.folder / files.pop(column)["file"]).unlink()
            else:
                column = "answer" if kind == "example" else "label"
                path = self.folder / files[column]["file"]
                np.save(path, rank[np.load(path)])
                files[column] = columns.entry(path)
            sources.append(row | {"columns": files})
        used = tokenizer.hash if tokenizer is not None and any(texts) else None
        self._write_manifest(
            {"format": FORMAT, "window": window, "tokenizer": used, "labels": labels, "sources": sources}
            | ({"task": self.task} if self.task else {}),
            limits,
            report,
        )

    def _strings(self, entries: dict[str, Any]) -> Columns:
        """The texts of a part, empty when it has none."""
        return columns.load(self.folder, {n: e for n, e in entries.items() if n in STRINGS}, content=False)

    def _write_manifest(self, identity: dict[str, Any], limits: Limits, report: Report) -> None:
        """The manifest: what the hash of the index covers, and what only describes it (places, times, counts)."""
        files = self.files.close()
        manifest = {
            "hash": digest(identity | {"files": {name: e for name, e in files.items() if name != "mtime_ns"}}),
            **identity,
            "files": files,
            "roots": [str(root) for root in self.roots],
            "limits": dataclasses.asdict(limits),
            "report": report.as_dict(),
            "quarantine": columns.entry(self.folder / "quarantine.jsonl"),
        }
        text = json.dumps(manifest | {"manifest_hash": digest(manifest)}, indent=1)
        (self.folder / "manifest.json").write_text(text, encoding="ascii")

    def _tokenize(
        self, number: int, kind: str, strings: Columns, tokenizer: TextTokenizer
    ) -> tuple[dict[str, Any], int, int]:
        """Ids of a part's strings as columns, how many there are, and how many of them are unknown."""
        table = Table(self.folder, str(number), TOKENS)
        token, token_end = table.columns.values()
        unknown = 0
        for chunk in _chunks(strings):
            ids = tokenizer.batch(chunk)
            unknown += sum(int((x == tokenizer.unk).sum()) for x in ids)
            if kind == "text":
                ids = [np.append(x, tokenizer.eos) for x in ids]
            token_end.extend(token.rows + np.cumsum([len(x) for x in ids]))
            token.extend(np.concatenate(ids))
        return table.close(), token.rows, unknown


def _warn_of_unknown(row: dict[str, Any]) -> None:
    share = row["unknown_tokens"] / max(1, row["tokens"])
    if share > UNKNOWN_SHARE:
        message = "source %s (%s): %.1f %% of the tokens are unknown to the tokenizer: train one on these texts"
        logger.warning(message, row["name"], row["kind"], 100 * share)


def _chunks(strings: Columns) -> Iterator[list[str]]:
    count = len(strings["string_end"])
    for start in range(0, count, CHUNK):
        yield [string(strings, "string", i) for i in range(start, min(start + CHUNK, count))]


def _all_strings(parts: Iterable[Columns]) -> Iterator[str]:
    return (text for part in parts if part for chunk in _chunks(part) for text in chunk)


def _sorted_labels(labels: Iterable[str]) -> list[str]:
    """Names in order; numbers, when all are, by value."""
    names = list(labels)
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (len(name) if numbers else 0, name))
