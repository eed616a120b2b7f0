"""The one pass over raw data: read, validate, decode, hash and measure every record, here or in other processes."""

from __future__ import annotations

import itertools
import multiprocessing as mp
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

from multiway.data.image import Limits, open_picture
from multiway.data.records import NO_GOLD, Example, Fault, Fingerprint, Ignored, Record, Span, content_hash, read_bytes
from multiway.data.sources import RawSource
from multiway.data.text import MAX_CHARS, sanitize
from multiway.errors import DataError, MissingInputError, RecordError

BATCH = 512  # records handed to the processes at once
EXAMPLES = 3
KNOWN = 2**15  # pictures whose size is kept at hand
_known: dict[tuple[bytes, Limits], tuple[tuple[int, int], tuple[str, ...]]] = {}


class Picture(NamedTuple):
    """A picture that is good: where it lies, width and height in pixels, and the hash of its bytes."""

    span: Span
    fingerprint: Fingerprint
    size: tuple[int, int]
    hash: bytes


class Measured(NamedTuple):
    """A record that is good. ``texts`` are sanitized; ``pictures``: none of a text alone."""

    record: Record | Example
    texts: tuple[str, ...]
    notes: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()


@dataclass
class Report:
    """What the pass found: ``seen`` records are ``indexed`` (by source and kind) or faults.

    ``notes``: how often each rule changed something; ``ignored``: files and shard members by suffix that no rule
    reads; ``faults``: bad records and damaged shards; ``shards``: tar shards looked at. ``missing_counts``: whether a
    record whose picture is not there is a bad one. One that people could not agree on (``no_gold``) never is: it is
    listed.
    """

    seen: int = 0
    shards: int = 0
    indexed: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    missing_counts: bool = True

    @property
    def quarantined(self) -> int:
        """Number of bad records, missing pictures among them."""
        return sum(not fault.shard for fault in self.faults)

    @property
    def reasons(self) -> Counter[str]:
        """Number of faults by reason, damaged shards included."""
        return Counter(fault.reason for fault in self.faults)

    def require(self, max_bad_fraction: float, max_bad_shards: float) -> None:
        """Raise DataError when too many records or shards are bad or none is good, MissingInputError for no data."""
        if not self.seen and not self.faults:
            raise MissingInputError(f"nothing to read: no record, and files that no rule reads: {dict(self.ignored)}")
        listed = {NO_GOLD} if self.missing_counts else {NO_GOLD, "missing"}
        bad = [f for f in self.faults if not f.shard and f.reason not in listed]
        damaged = {fault.where.file for fault in self.faults if fault.shard}
        too_many = len(bad) > max_bad_fraction * self.seen or len(damaged) > max_bad_shards * self.shards
        if not too_many and sum(self.indexed.values()):
            return
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.reasons.most_common()) or "no reason"
        examples = "".join(f"\n  {fault}" for fault in self.faults[:EXAMPLES])
        raise DataError(
            f"{len(bad)} of {self.seen} records and {len(damaged)} of {self.shards} shards are bad ({reasons}), "
            f"{sum(self.indexed.values())} records are good. Expected at most {max_bad_fraction:.2%} of the records "
            f"and {max_bad_shards:.0%} of the shards, and a good one. The first:{examples}"
        )

    def as_dict(self) -> dict[str, object]:
        """The counts as plain values."""
        return {
            "seen": self.seen,
            "indexed": sum(self.indexed.values()),
            "quarantined": self.quarantined,
            "reasons": dict(sorted(self.reasons.items())),
            "notes": dict(sorted(self.notes.items())),
            "ignored": dict(sorted(self.ignored.items())),
            "shards": self.shards,
        }


def inspect(item: Record | Example | Fault, limits: Limits) -> Measured | Fault:
    """Validate and measure one record: its texts are cleaned, its pictures are read, hashed and decoded in full."""
    if isinstance(item, Fault):
        return item
    stage = "validate"
    pictures = []
    try:
        texts, notes = clean(item)
        spans = item.images if isinstance(item, Example) else () if item.image is None else (item.image,)
        if isinstance(item, Record) and item.image is None and item.label is not None:
            notes += ("label_unused",)
        for file, offset, length in spans:
            stage = "read"
            if length is not None:
                limits.check_bytes(length)
            content = read_bytes(item.root / file, offset, length, most=limits.max_bytes)
            stage = "decode"
            digest = content_hash(content.data)
            size, more = _decoded(digest, content.data, limits)
            notes += more + ("read_again",) * content.retries
            pictures.append(Picture(Span(file, offset, len(content.data)), content.fingerprint, size, digest))
        return Measured(item, texts, notes, tuple(pictures))
    except RecordError as error:
        return Fault.of(error, item.where, stage)


def _decoded(digest: bytes, data: bytes, limits: Limits) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Size and notes of a picture; one that was decoded lately, many questions may be about it, is known."""
    if (digest, limits) not in _known:
        if len(_known) == KNOWN:
            _known.pop(next(iter(_known)))
        picture, notes = open_picture(data, limits)
        _known[digest, limits] = picture.size, notes
    return _known[digest, limits]


def clean(record: Record | Example) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The record's texts after sanitizing, empty ones dropped, and the notes of what that changed.

    A text without a picture is a document: it is cut into pieces of MAX_CHARS, so that nothing of it is lost.

    Raises RecordError (``empty_text``) when there were texts and none is left, or one of an example is empty.
    """
    texts, notes = [], []
    given = record.texts
    if isinstance(record, Record) and record.image is None:
        given = [text[i : i + MAX_CHARS] for text in given for i in range(0, len(text) or 1, MAX_CHARS)]
    for text, changes in map(sanitize, given):
        notes += changes
        if text:
            texts.append(text)
        else:
            notes.append("empty_text_dropped")
    if record.texts and (not texts or (isinstance(record, Example) and len(texts) < len(record.texts))):
        raise RecordError(f"no text is left of {record.texts[0][:40]!r}", reason="empty_text")
    return tuple(texts), tuple(notes)


def scan(
    sources: Sequence[RawSource], report: Report, *, limits: Limits, workers: int = 0, progress: bool = False
) -> Iterator[tuple[RawSource, Measured]]:
    """Yield every good record of the sources in order; faults and counts go to the report.

    ``workers``: processes that decode, 0 = this one; the result does not depend on it. ``progress``: show a bar with
    rate and time left on the terminal.
    """
    report.shards = sum(len(source.files) for source in sources if source.format == "tar")
    total = sum(not isinstance(item, Ignored) for source in sources for item in source) if progress else 0
    with _bar(progress) as bar, _pool(workers) as pool:
        task = bar.add_task("reading", total=total)
        results = ((source, x) for source in sources for x in _inspect(_items(source, report), limits, pool))
        for source, result in results:
            bar.advance(task)
            if isinstance(result, Fault):
                report.faults.append(result)
                continue
            report.indexed[source.name, result.record.kind] += 1
            report.notes.update(result.notes)
            yield source, result


def _items(source: RawSource, report: Report) -> Iterator[Record | Example | Fault]:
    """A source's records and faults; what is ignored is counted."""
    for item in source:
        if isinstance(item, Ignored):
            report.ignored[PurePosixPath(item.file).suffix or PurePosixPath(item.file).name] += 1
            continue
        report.seen += not isinstance(item, Fault) or not item.shard
        yield item


def _inspect(
    items: Iterator[Record | Example | Fault], limits: Limits, pool: Executor | None
) -> Iterator[Measured | Fault]:
    """Inspect items, in order. Raises DataError when a process dies over one."""
    if pool is None:
        yield from (inspect(item, limits) for item in items)
        return
    while batch := list(itertools.islice(items, BATCH)):
        try:
            yield from pool.map(partial(inspect, limits=limits), batch, chunksize=16)
        except BrokenProcessPool as error:
            first, last = batch[0].where, batch[-1].where
            raise DataError(
                f"a decoding process died at one of {len(batch)} records from {first.file} {first.key} to {last.file} "
                f"{last.key}, for want of memory or over a picture: take fewer workers, or none to see which it is"
            ) from error


def _pool(workers: int) -> ProcessPoolExecutor | nullcontext[None]:
    """Processes for untrusted bytes, forked off a clean server."""
    if not workers:
        return nullcontext()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context)


class _Rate(ProgressColumn):
    """Records per second."""

    def render(self, task: Task) -> str:
        return f"{task.speed or 0:,.0f}/s"


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
