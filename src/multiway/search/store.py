"""Stores of vectors: a folder of chunks, each a matrix and the records its rows stand for.

``store.json`` says which model made the vectors and of what; chunk i is ``chunk-%06d.jsonl``, one line per row, and
``chunk-%06d.safetensors``, whose ``vectors`` (n, D) float32 have length 1 and whose header holds the hashes of both and
the faults of records that have no row. The matrix is written last: a chunk counts when it is there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multiway.errors import DataError, MissingInputError, NumericsError
from multiway.weights.io import write

FORMAT = 1
MANIFEST, QUARANTINE = "store.json", "quarantine.jsonl"
TOLERANCE = 1e-3
"""How far from 1 the length of a vector may be; bf16 rounds by less."""


@dataclass(frozen=True)
class Chunk:
    """One chunk: ``vectors`` float32 (n, D), mapped from disk; ``faults``: quarantine rows of what has no vector."""

    vectors: Tensor
    faults: list[dict[str, Any]]


@dataclass(frozen=True)
class Store:
    """An open store; row r of the whole is row r of its chunks one after the other.

    ``manifest``: content of ``store.json``; ``parts``: the chunks' vectors, float32 (n, D) each, mapped from disk.
    """

    folder: Path
    manifest: Mapping[str, Any]
    parts: list[Tensor]
    faults: list[dict[str, Any]]
    _records: dict[int, list[dict[str, Any]]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Store:
        """Open a complete store; ``verify`` also reads it once, comparing every hash and length.

        Raises MissingInputError without one, DataError when chunks are missing or damaged, NumericsError for vectors
        that do not have length 1.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        count = math.ceil(manifest["entries"] / manifest["chunk"])
        missing = [number for number in range(count) if not chunk_path(folder, number).is_file()]
        if missing:
            some = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            raise DataError(f"{folder}: chunks {some} of {count} are missing: run the same `multiway embed` again")
        chunks = [read_chunk(folder, number, verify=verify) for number in range(count)]
        faults = [fault for chunk in chunks for fault in chunk.faults]
        return cls(folder, manifest, [chunk.vectors for chunk in chunks], faults)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def fingerprint(self) -> str:
        """That of the model which made the vectors; only its vectors may be compared with them."""
        return self.manifest["fingerprint"]

    @cached_property
    def vectors(self) -> Tensor:
        """All vectors in memory, float32 (N, D)."""
        return torch.cat([part for part in self.parts if len(part)] or self.parts[:1])

    def record(self, row: int) -> dict[str, Any]:
        """What a row stands for: ``kind`` (image or text), ``key``, ``path`` or None, ``captions``."""
        for number, part in enumerate(self.parts):
            if row < len(part):
                if number not in self._records:
                    self._records[number] = list(_rows(records_path(self.folder, number).read_bytes()))
                return self._records[number][row]
            row -= len(part)
        raise IndexError(f"row {row + len(self)} of a store with {len(self)} rows")


def chunk_path(folder: Path, number: int) -> Path:
    """Where the vectors of a chunk lie."""
    return folder / f"chunk-{number:06d}.safetensors"


def records_path(folder: Path, number: int) -> Path:
    """Where the records of a chunk lie."""
    return folder / f"chunk-{number:06d}.jsonl"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of ``store.json``; raises MissingInputError without one, DataError for another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; a store is made by `multiway embed`")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] == FORMAT:
            return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): embed into a new folder") from error
    raise DataError(f"{path} has format {manifest['format']!r}, expected {FORMAT}: embed into a new folder")


def write_chunk(
    folder: Path,
    number: int,
    vectors: Tensor,
    records: Sequence[Mapping[str, Any]],
    faults: Sequence[Mapping[str, Any]],
) -> None:
    """Write a chunk, whole or not at all: vectors float32 (n, D) and n records; the same input gives the same bytes.

    Raises NumericsError for vectors that do not have length 1, naming the first record.
    """
    assert len(vectors) == len(records), "a record for every row"
    check_lengths(vectors, lambda row: records[row]["key"])
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    header = {"vectors": _hash(vectors), "records": hashlib.sha256(lines).hexdigest(), "faults": list(faults)}
    metadata = {"multiway": json.dumps(header)}  # one key: safetensors does not keep the order of several
    write(records_path(folder, number), lambda path: path.write_bytes(lines))
    write(chunk_path(folder, number), lambda path: save_file({"vectors": vectors}, path, metadata=metadata))


def read_chunk(folder: Path, number: int, *, verify: bool) -> Chunk:
    """Map a chunk; ``verify`` compares hashes and lengths. Raises DataError naming it when it is damaged."""
    path = chunk_path(folder, number)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["multiway"])
            chunk = Chunk(file.get_tensor("vectors"), header["faults"])
        if chunk.vectors.ndim != 2 or chunk.vectors.dtype != torch.float32:
            raise DataError(f"{path} holds {chunk.vectors.dtype} {tuple(chunk.vectors.shape)}, expected float32 (n, D)")
        lines = records_path(folder, number).read_bytes() if verify else b""
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): run the same `multiway embed` again") from error
    if verify:
        if (_hash(chunk.vectors), hashlib.sha256(lines).hexdigest()) != (header["vectors"], header["records"]):
            raise DataError(f"{path} or its records were altered: run the same `multiway embed` again")
        check_lengths(chunk.vectors, lambda row: f"row {row} of {path}")
    return chunk


def check_lengths(vectors: Tensor, name: Any) -> None:
    """Raise NumericsError unless all rows of (n, D) have length 1; ``name(row)``: the first that does not."""
    lengths = vectors.norm(dim=1)
    bad = (~((lengths - 1).abs() < TOLERANCE)).nonzero()  # NaN too
    if len(bad):
        row = int(bad[0])
        raise NumericsError(
            f"the vector of {name(row)} has length {float(lengths[row]):.3g}, expected 1 ({len(bad)} of {len(vectors)} "
            "are so): the model has diverged"
        )


def _hash(vectors: Tensor) -> str:
    return hashlib.sha256(vectors.contiguous().numpy().data).hexdigest()


def _rows(lines: bytes) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in lines.splitlines())
