"""Tar shards in webdataset's format, by their headers alone: nothing is extracted, every picture is (offset, length).

A sample is the adjacent members that share a key, the member's path up to the first dot of its last part: ``key.jpg``
(or another picture), ``key.txt`` (captions, one a line), ``key.json`` (`parse_fields`;
its texts count only without a ``.txt``) and ``key.cls`` (label). Other members are counted as ignored, those that
could carry code (``.pkl .npy ...``) make their sample a fault. A shard must end in two zero blocks: today's readers
take a truncated one for a short one.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from multiway.data.records import (
    MAX_CAPTION_FILE,
    Fault,
    Ignored,
    Record,
    Span,
    Where,
    open_file,
    parse_fields,
    parse_json,
    utf8,
)
from multiway.errors import RecordError

IMAGE_PARTS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"))
TEXT_PARTS = frozenset(("txt", "json", "cls"))
EXECUTABLE = frozenset(
    ("pkl", "pickle", "joblib", "dill", "pt", "pth", "ckpt", "bin", "npy", "npz", "py", "pyd", "so", "dll", "exe", "sh")
)
MAX_MEMBERS = 1_000_000
MAX_EXTENDED = 2**16  # bytes of a long name or a PAX header
BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A tar member: its name, whether it is a regular file, and where its data lie."""

    name: str
    regular: bool
    offset: int
    size: int


class Damage(NamedTuple):
    """Where a shard stops making sense, and why."""

    offset: int
    reason: str
    message: str


def read(source: str, root: Path, files: tuple[str, ...]) -> Iterator[Record | Fault | Ignored]:
    """Enumerate the samples of shards; a key that occurs again in a later shard is a fault, the first is kept."""
    seen: set[bytes] = set()
    for file in files:
        try:
            with open_file(root / file) as (stream, fingerprint):
                yield from _read_shard(stream, fingerprint.size, source, root, file, seen)
        except RecordError as error:
            yield Fault(Where(source, file, file), "read", error.reason, str(error), shard=True)


def _read_shard(
    stream: BinaryIO, size: int, source: str, root: Path, file: str, seen: set[bytes]
) -> Iterator[Record | Fault | Ignored]:
    samples: dict[str, dict[str, Member]] = {}
    bad: dict[str, RecordError] = {}
    last = ""
    for item in walk(stream, size):
        if isinstance(item, Damage):
            kept = f"the {max(len(samples) - 1, 0)} samples before it are used"
            where = Where(source, file, last or file, offset=item.offset, bytes=size)
            yield Fault(where, "read", item.reason, f"{item.message}; {kept}", shard=True)
            bad.setdefault(last, RecordError("the shard is damaged behind this sample", reason="truncated"))
            break
        key, part = _split(item.name)
        if not key:
            yield Ignored(item.name)
            continue
        members = samples.setdefault(key, {})
        error = _objection(item, part, again=bool(members) and key != last, twice=part in members)
        if error is not None:
            bad.setdefault(key, error)
        members[part] = item
        last = key
    for key, members in samples.items():
        first = next(iter(members.values()))
        where = Where(source, file, key, offset=first.offset - BLOCK, bytes=sum(m.size for m in members.values()))
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        try:
            if key in bad:
                raise bad[key]
            if digest in seen:
                raise RecordError("the key occurs in an earlier shard, whose sample is kept", reason="duplicate_key")
            seen.add(digest)
            yield _sample(stream, where, root, members)
            yield from (Ignored(m.name) for part, m in members.items() if part not in IMAGE_PARTS | TEXT_PARTS)
        except RecordError as error:
            yield Fault.of(error, where, "parse")


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member's name; no key for hidden files."""
    path = PurePosixPath(name)
    stem, _, part = path.name.partition(".")
    return (str(path.with_name(stem)) if stem else ""), part.lower()


def _objection(member: Member, part: str, *, again: bool, twice: bool) -> RecordError | None:
    """Why a member spoils its sample, if it does."""
    name = member.name
    if name.startswith("/") or ".." in PurePosixPath(name).parts or not name.isprintable():
        return RecordError(f"member name {name!r} is not a plain relative path", reason="name")
    if not member.regular:
        return RecordError(f"member {name!r} is a link, device or sparse file", reason="member_type")
    if part.rpartition(".")[2] in EXECUTABLE:
        return RecordError(f"member {name!r} is of an executable format, which is never read", reason="executable")
    if twice:
        return RecordError(f"member {name!r} occurs more than once", reason="duplicate_member")
    if again:
        return RecordError(f"member {name!r} lies apart from the others of its sample", reason="interleaved")
    return None


def _sample(stream: BinaryIO, where: Where, root: Path, members: dict[str, Member]) -> Record:
    """The record that a sample's members are."""

    def content(part: str) -> bytes:
        member = members[part]
        if member.size > MAX_CAPTION_FILE:
            found = f"{member.name!r} has {member.size} bytes"
            raise RecordError(f"{found}, at most {MAX_CAPTION_FILE} are allowed", reason="bytes")
        stream.seek(member.offset)
        return stream.read(member.size)

    pictures = [member for part, member in members.items() if part in IMAGE_PARTS]
    if len(pictures) > 1:
        raise RecordError(f"sample with {len(pictures)} pictures, expected one", reason="duplicate_member")
    texts, label = (), None
    if "json" in members:
        _, texts, label = parse_fields(parse_json(content("json")))
    if "txt" in members:
        texts = caption_lines(content("txt"))
    if "cls" in members:
        label = utf8(content("cls")).strip()
    if not pictures and not texts:
        raise RecordError(f"sample of {sorted(members)} has neither image nor text", reason="schema")
    image = Span(where.file, pictures[0].offset, pictures[0].size) if pictures else None
    return Record(where, root, image, texts, label)


def caption_lines(data: bytes) -> tuple[str, ...]:
    """The captions in a caption file: its lines that are not blank, or one empty caption. Raises RecordError."""
    return tuple(line for line in utf8(data).splitlines() if line.strip()) or ("",)


def walk(stream: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Members of a tar of ``size`` bytes in order, folders left out; a Damage ends it where the shard is not whole."""
    offset = count = 0
    extended: dict[str, str] = {}
    while True:
        stream.seek(offset)
        block = stream.read(BLOCK)
        if not block.strip(b"\0"):
            yield from _end(stream, offset, block, size)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            length = int(extended.get("size", info.size))
            data = offset + BLOCK
            if length < 0:
                raise ValueError("negative size")
        except (tarfile.HeaderError, ValueError) as error:
            reason = "truncated" if len(block) < BLOCK else "header" if offset else "not_a_tar"
            yield Damage(offset, reason, f"no tar header at byte {offset} of {size}: {error}, found {block[:16]!r}")
            return
        if data + length > size:
            message = f"member {info.name!r} needs bytes {data} to {data + length}, the shard ends at {size}"
            yield Damage(offset, "truncated", message)
            return
        count += 1
        if count > MAX_MEMBERS or (info.type in b"LKxg" and length > MAX_EXTENDED):
            what = f"an extended header of {length} bytes" if count <= MAX_MEMBERS else f"over {MAX_MEMBERS} members"
            yield Damage(offset, "header", f"{what} at byte {offset}")
            return
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            stream.seek(data)
            extended |= _extended(info.type, stream.read(length))
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and "sparse" not in extended
            if info.type != tarfile.DIRTYPE:
                yield Member(extended.get("path", info.name), regular, data, length)
            extended = {}
        offset = data + -(-length // BLOCK) * BLOCK


def _end(stream: BinaryIO, offset: int, block: bytes, size: int) -> Iterator[Damage]:
    """What is wrong with the end of a shard, if something is: two zero blocks, then nothing but zeros."""
    if len(block) + len(stream.read(BLOCK)) < 2 * BLOCK:
        what = "is empty" if size == 0 else f"ends at byte {size} without the two zero blocks that close a tar"
        yield Damage(offset, "truncated" if size else "empty", f"the shard {what}")
        return
    stream.seek(offset)
    while chunk := stream.read(2**20):
        if chunk.strip(b"\0"):
            yield Damage(offset, "trailing_data", f"there are data behind the end marker at byte {offset} of {size}")
            return


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """Name and size out of a GNU long name or a PAX header; ``sparse`` when it describes a file with holes."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        name, _, value = rest[: int(length) - len(length) - 2].decode("utf-8", "surrogateescape").partition("=")
        if name in ("path", "size"):
            found[name] = value
        elif name.startswith("GNU.sparse"):
            found["sparse"] = value
        data = data[int(length) :]
    return found
