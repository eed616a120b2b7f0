"""Columns of an index on disk: ``.npy`` files that are appended to, checked by size and SHA-256, and mapped to read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike

from multiway.errors import DataError

Columns = dict[str, np.ndarray]


class Column:
    """A ``.npy`` file of unknown length: rows are appended, and the header is written again when it is closed.

    ``shape``: of one row.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.shape, self.rows = path, np.dtype(dtype), shape, 0
        self._file = path.open("wb")
        self._header()

    def extend(self, rows: ArrayLike) -> None:
        """Append an array of rows (n, *shape), converted to the column's type."""
        values = np.ascontiguousarray(rows, dtype=self.dtype)
        self._file.write(values.data)
        self.rows += len(values)

    def close(self) -> None:
        """Finish the file."""
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        """numpy pads a header so that it has the same length whatever the number of rows."""
        descr = npy.dtype_to_descr(self.dtype)
        shape = (self.rows, *self.shape)
        npy.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})


class Table:
    """Columns that are written together: ``{name: (dtype, *shape of a row)}`` in files ``prefix.name.npy``."""

    def __init__(self, folder: Path, prefix: str, columns: dict[str, tuple[Any, ...]]) -> None:
        self.columns = {
            n: Column(folder / f"{prefix}.{n}.npy", dtype, tuple(shape)) for n, (dtype, *shape) in columns.items()
        }

    def add(self, **row: ArrayLike) -> None:
        """Append one value to each column named."""
        for name, value in row.items():
            self.columns[name].extend(np.asarray(value)[None])

    def add_strings(self, name: str, strings: Iterable[str]) -> None:
        """Append strings to the byte column ``name``, and where each ends to ``name_end``."""
        ends, bytes_ = self.columns[f"{name}_end"], self.columns[name]
        for string in strings:
            bytes_.extend(np.frombuffer(string.encode("utf-8", "surrogateescape"), np.uint8))
            ends.extend([bytes_.rows])

    def close(self) -> dict[str, dict[str, Any]]:
        """Close all columns; return the manifest entry of each."""
        entries = {}
        for name, column in self.columns.items():
            column.close()
            entries[name] = entry(column.path)
        return entries


def entry(path: Path) -> dict[str, Any]:
    """Manifest entry of a file: name, bytes and SHA-256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def verify(folder: Path, expected: dict[str, Any], *, content: bool) -> None:
    """Raise DataError unless the file of a manifest entry is there with its size and, with ``content``, its hash."""
    path = folder / expected["file"]
    size = path.stat().st_size if path.is_file() else -1
    if size != expected["bytes"]:
        found = "is missing" if size < 0 else f"has {size} bytes"
        raise DataError(f"{path} {found}, expected {expected['bytes']} bytes: build the index again")
    if content and entry(path)["sha256"] != expected["sha256"]:
        raise DataError(f"{path} is altered: its SHA-256 is not {expected['sha256'][:16]}...: build the index again")


def load(folder: Path, entries: dict[str, Any], *, content: bool) -> Columns:
    """Verify columns and map them into memory, read-only. Raises DataError as `verify`.

    They are plain arrays: reading an item of a ``np.memmap`` takes several times as long.
    """
    for expected in entries.values():
        verify(folder, expected, content=content)
    return {n: np.asarray(np.load(folder / e["file"], mmap_mode="r", allow_pickle=False)) for n, e in entries.items()}


def piece(values: np.ndarray, ends: np.ndarray, i: int) -> np.ndarray:
    """Part ``i`` of a column whose parts end at ``ends``."""
    return values[int(ends[i - 1]) if i else 0 : int(ends[i])]


def string(columns: Columns, name: str, i: int) -> str:
    """String ``i`` of a column that `Table.add_strings` wrote."""
    return piece(columns[name], columns[f"{name}_end"], i).tobytes().decode("utf-8", "surrogateescape")
