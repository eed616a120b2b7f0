"""Everything a folder, a data file or an index holds, as vectors in a store; started again, it continues.

What is embedded is cut into chunks of fixed size. Each is computed from its own entries alone and written whole or not
at all, so that any number of processes may share the work, be killed, and start again, with the same bytes as result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from multiway.data.image import Limits
from multiway.data.index import Index, Source
from multiway.data.records import Example, Fault, Ignored, Record, Where, read_bytes
from multiway.data.scan import clean
from multiway.data.sources import RawSource, discover
from multiway.engine.log import CONSOLE, LINE_SECONDS
from multiway.errors import ConfigError, DataError, RecordError, WriteError
from multiway.pretrained import Pretrained, load
from multiway.search.store import (
    FORMAT,
    MANIFEST,
    QUARANTINE,
    chunk_path,
    read_chunk,
    read_manifest,
    write_chunk,
)
from multiway.weights.io import write

CHUNK = 1024
"""Entries of a chunk: what a kill can cost."""
AHEAD = 1
"""Chunks whose pictures are read while another is computed."""
THREADS = 8


@dataclass(frozen=True)
class Entry:
    """One vector to be: a picture, or a text where there is no picture.

    ``path``: its file, None where it has none of its own; ``captions``: of a text, the text alone; ``read``: the
    picture as a model sees it, or RecordError; None for a text.
    """

    where: Where
    kind: Literal["image", "text"]
    path: str | None
    captions: tuple[str, ...]
    read: Callable[[Pretrained], Tensor] | None = None

    def row(self) -> dict[str, Any]:
        """The line in the chunk's records."""
        return {"kind": self.kind, "key": self.where.key, "path": self.path, "captions": list(self.captions)}


@dataclass(frozen=True)
class Listing:
    """All entries of a source, and the faults among them, in an order that never changes.

    ``count``: of entries and faults; ``hash``: of what they are called and say, not of the pictures' content;
    ``ignored``: files that no rule reads.
    """

    items: Callable[[], Iterator[Entry | Fault]]
    count: int
    hash: str
    ignored: int = 0


def embed(
    source: str | Path,
    model: Pretrained | str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    batch: int = 64,
    threads: int = THREADS,
    rank: int | None = None,
    world: int | None = None,
) -> int:
    """Embed every picture, and every text that has none, into the store ``out``; returns how many records are bad.

    ``source``: an index, or anything `multiway.data.sources` reads, ``split`` choosing a part; ``model``: loaded,
    or a folder or hub id; ``threads``: read pictures ahead; ``rank``, ``world``: this process takes chunks
    ``rank::world``, None = as ``RANK`` and ``WORLD_SIZE`` say, else alone. Finished chunks are verified and kept. Bad
    records are listed in ``quarantine.jsonl`` and have no row.

    Raises ConfigError when ``out`` holds vectors of another model or source, DataError when there is nothing good,
    NumericsError for vectors without length 1, WriteError when the disk refuses.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world} processes: expected 0 to {world - 1}")
    encoder = model if isinstance(model, Pretrained) else load(model, device=_device())
    listing = list_entries(Path(source), split)
    if listing.count == 0:
        raise DataError(f"{source}: nothing to embed, {listing.ignored} files of other kinds")
    out = Path(out)
    try:
        _claim(out, source, encoder, listing, rank)
        _work(out, encoder, listing, batch, threads, rank, world)
        faults = _list_faults(out, rank)
    except OSError as error:
        raise WriteError(f"cannot write the store {out}: {error}") from error
    bad = f"{len(faults)} bad records, listed in {out / QUARANTINE}" if faults else "no bad record"
    if rank == 0:
        note = f"{out}: {listing.count} entries, {bad}; {listing.ignored} files of other kinds"
        CONSOLE.print(note, soft_wrap=True)
    if len(faults) == listing.count:
        raise DataError(f"{source}: all {listing.count} records are bad; {bad}. The first: {faults[0]['message']}")
    return len(faults)


# -------------------------------------------------------------------------------------------------------------- entries


def list_entries(source: Path, split: str | None = None) -> Listing:
    """The entries of an index or of raw data. Raises MissingInputError and ConfigError as they do."""
    if (source / "manifest.json").is_file():
        index = Index.open(source).of()
        return Listing(partial(_of_index, index), sum(len(part) for part in index.sources), index.hash)
    raw = discover(source, split)
    digest, count, ignored = hashlib.sha256(), 0, 0
    for item in _of_raw(raw):
        if isinstance(item, Ignored):
            ignored += 1
            continue
        digest.update(json.dumps(item.row()).encode())
        count += 1
    return Listing(lambda: (x for x in _of_raw(raw) if not isinstance(x, Ignored)), count, digest.hexdigest(), ignored)


def _of_index(index: Index) -> Iterator[Entry | Fault]:
    for source in index.sources:
        for i in range(len(source)):
            where = Where(source.name, source.key(i), source.key(i))
            captions = tuple(source.strings(i))
            if source.kind == "text":
                yield Entry(where, "text", None, captions)
            else:
                found = (root / where.key for root in index.roots)
                path = next((str(path) for path in found if path.is_file()), None)
                yield Entry(where, "image", path, captions, partial(_read_indexed, source, i))


def _of_raw(sources: Iterable[RawSource]) -> Iterator[Entry | Fault | Ignored]:
    for item in itertools.chain.from_iterable(sources):
        if isinstance(item, Record):
            yield from _of_record(item)
        elif not isinstance(item, Example):  # of which `discover` finds none
            yield item


def _of_record(record: Record) -> Iterator[Entry | Fault]:
    try:
        texts = clean(record)[0]
    except RecordError as error:
        if record.image is None:
            yield Fault.of(error, record.where, "validate")
            return
        texts = ()
    if record.image is None:
        yield from (Entry(record.where, "text", None, (text,)) for text in texts)
    else:
        yield Entry(record.where, "image", str(record.root / record.image.file), texts, partial(_read_raw, record))


def _read_indexed(source: Source, i: int, encoder: Pretrained) -> Tensor:
    return encoder.picture(source.image(i, encoder.source_px))


def _read_raw(record: Record, encoder: Pretrained) -> Tensor:
    assert record.image is not None, "it is an entry with a picture"
    file, offset, length = record.image
    return encoder.picture(read_bytes(record.root / file, offset, length, most=Limits().max_bytes).data)


# ----------------------------------------------------------------------------------------------------------------- work


def _claim(out: Path, source: str | Path, encoder: Pretrained, listing: Listing, rank: int) -> None:
    """Write what the store is, or refuse to go on with one that is something else."""
    name = str(Path(encoder.name).resolve()) if Path(encoder.name).is_dir() and encoder.name else encoder.name
    manifest = {
        "format": FORMAT,
        "fingerprint": encoder.fingerprint,
        "precision": encoder.precision,
        "listing": listing.hash,
        "entries": listing.count,
        "chunk": CHUNK,
        "model": name,
        "source": str(Path(source).resolve()),
    }
    if not (out / MANIFEST).exists():
        out.mkdir(parents=True, exist_ok=True)
        _write_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n", rank)
        return
    old = read_manifest(out)
    for key, what in (("fingerprint", "model"), ("listing", "data"), ("precision", "precision"), ("chunk", "chunk")):
        if old.get(key) != manifest[key]:
            raise ConfigError(
                f"{out} holds vectors of another {what}: {old.get(key)}, now {manifest[key]} (model {old['model']}, "
                f"source {old['source']}); they do not go together: embed into a new folder"
            )


def _work(out: Path, encoder: Pretrained, listing: Listing, batch: int, threads: int, rank: int, world: int) -> None:
    """Compute the chunks of this process that are not there."""
    count = listing.count
    meter = _Meter(
        sum(min(CHUNK, count - start) for start in range(rank * CHUNK, count, world * CHUNK)), shown=rank == 0
    )
    todo = (
        (number, items)
        for number, items in enumerate(_chunks(listing.items()))
        if number % world == rank and not _is_done(out, number, len(items), meter)
    )
    try:
        for number, read in _read_ahead(todo, encoder, threads):
            rows = [(entry, picture) for entry, picture in read if isinstance(entry, Entry)]
            faults = [fault.row() for fault, _ in read if isinstance(fault, Fault)]
            write_chunk(out, number, _vectors(rows, encoder, batch), [entry.row() for entry, _ in rows], faults)
            meter.add(len(read))
    finally:
        meter.close()


def _chunks(items: Iterator[Entry | Fault]) -> Iterator[list[Entry | Fault]]:
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def _is_done(out: Path, number: int, size: int, meter: _Meter) -> bool:
    """Whether a chunk is there and whole; one that is damaged is computed again."""
    if not chunk_path(out, number).is_file():
        return False
    try:
        read_chunk(out, number, verify=True)
    except DataError as error:
        CONSOLE.print(f"{error}: computing it again", soft_wrap=True)
        return False
    meter.skip(size)
    return True


Read = list[tuple[Entry | Fault, Tensor | None]]


def _read_ahead(
    chunks: Iterator[tuple[int, list[Entry | Fault]]], encoder: Pretrained, threads: int
) -> Iterator[tuple[int, Read]]:
    """Chunks with their pictures, read by threads while the one before is computed."""
    pending: deque[tuple[int, list[Future[tuple[Entry | Fault, Tensor | None]]]]] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            for number, items in chunks:
                pending.append((number, [pool.submit(_read, item, encoder) for item in items]))
                if len(pending) > AHEAD:
                    done, futures = pending.popleft()
                    yield done, [future.result() for future in futures]
            for done, futures in pending:
                yield done, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _read(item: Entry | Fault, encoder: Pretrained) -> tuple[Entry | Fault, Tensor | None]:
    """The picture of an entry; the fault, if it has none that can be used."""
    if isinstance(item, Fault) or item.read is None:
        return item, None
    try:
        return item, item.read(encoder)
    except RecordError as error:
        return Fault.of(error, item.where, "decode"), None


def _vectors(rows: list[tuple[Entry, Tensor | None]], encoder: Pretrained, batch: int) -> Tensor:
    """Unit vectors (n, D) of pictures and texts, in order; (0, 0) of none."""
    places: dict[str, list[int]] = {"image": [], "text": []}
    for place, (entry, _) in enumerate(rows):
        places[entry.kind].append(place)
    parts, order = [torch.empty(0, 0)], places["image"] + places["text"]
    if places["image"]:  # which are views already: their centre was taken
        whole = dataclasses.replace(encoder, preprocessor=dataclasses.replace(encoder.preprocessor, share=None))
        parts.append(whole.encode_image([p for _, p in rows if p is not None], batch=batch))
    if places["text"]:
        parts.append(encoder.encode_text([rows[place][0].captions[0] for place in places["text"]], batch=batch))
    joined = torch.cat([part for part in parts if len(part)] or parts)
    return torch.empty_like(joined).index_copy_(0, torch.tensor(order, dtype=torch.int64), joined)


def _list_faults(out: Path, rank: int) -> list[dict[str, Any]]:
    """Write the quarantine from all chunks there are, again while other processes finish more, and return it."""
    listed: list[Path] = []
    faults: list[dict[str, Any]] = []
    while (found := sorted(out.glob("chunk-*.safetensors"))) != listed:
        numbers = [int(path.stem.rpartition("-")[2]) for path in found]
        faults = [fault for number in numbers for fault in read_chunk(out, number, verify=False).faults]
        _write_text(out / QUARANTINE, "".join(json.dumps(fault) + "\n" for fault in faults), rank)
        listed = found
    return faults


def _write_text(path: Path, text: str, rank: int) -> None:
    """Write a file that other processes may be writing too, with the same content."""
    write(path, lambda temporary: temporary.write_text(text, encoding="ascii"), tag=f"{rank}-")


def _device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


class _Meter:
    """Progress on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self.total, self.done, self.computed, self.shown = total, 0, 0, shown
        self.begun = self.spoken = time.monotonic()
        columns = (TextColumn("embed"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=CONSOLE, disable=not (shown and sys.stderr.isatty())
        )
        self.task = self.bar.add_task("embed", total=total, note="")
        self.bar.start()

    def skip(self, count: int) -> None:
        """Tell that entries were there already."""
        self.done += count

    def add(self, count: int) -> None:
        """Tell that entries were computed."""
        self.done += count
        self.computed += count
        now = time.monotonic()
        rate = self.computed / max(1e-9, now - self.begun)
        self.bar.update(self.task, completed=self.done, note=f"{rate:.1f}/s")
        if self.shown and self.bar.disable and now - self.spoken > LINE_SECONDS:
            self.spoken = now
            left = (self.total - self.done) / rate
            CONSOLE.print(f"embedded {self.done}/{self.total}  {rate:.1f}/s  {left:.0f} s left")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()
