"""Weights that somebody else published: read as data, whatever they are; nothing in a file is ever run.

Three formats, told apart by their first bytes: safetensors, NumPy's ``.npz``, and the zip files of `torch.save` and
`torch.jit.save` (``.pth``, ``.pt``, ``.bin``), whose pickle is read by `describe` and whose tensors are taken from the
archive directly. TorchScript's code and its constants are never looked at. Everything is checked against the size of
the file before memory is taken for it. Refused by name: pickles and what else runs on reading, compressed or damaged
archives. There is no flag that allows them.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multiway.errors import ConversionError, MissingInputError
from multiway.weights.archive import MAX_RECORDS, Archive
from multiway.weights.pickled import MAX_DIMENSIONS, Inert, Module, Storage, Stored, describe, flattened

WRAPPERS = ("model", "module", "state_dict")
"""Entries under which training scripts put the weights, the first of these that is there."""
PARALLEL = "module."
"""What data parallelism puts before every name; taken off."""
FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
"""The weights of a hub folder, each perhaps in parts with ``.index.json`` behind its name, the first that is there."""

DTYPES = frozenset((
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
))  # fmt: skip
MOST_SHARED = 2
"""Tensors that share memory may be this many times larger than the file: each is written on its own later."""
NUMPY_KINDS = "fiub"
MAX_HEADER = 10_000
"""Longest description of an array in an ``.npz``, in bytes."""
MAX_INDEX = 64 * 2**20
PART = re.compile(r"[\w-][\w.-]*")

SCRIPT = re.compile(r"[^/]+/(code/.*|(constants|traced_inputs)(\.pkl|/\d+))")
"""Records that only TorchScript has, and that are not read."""
DATA = re.compile(r"[^/]+/data/\d+")
TOLD = ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
"""What `torch.save` puts into its archives besides the data."""


@dataclass(frozen=True)
class Published:
    """What a published file holds: ``state``, its tensors by name, in its own names and dtypes.

    ``format``: ``safetensors``, ``npz``, ``torch`` or ``torchscript``; ``files``: all that were read; ``wrapper``: what
    was taken off around the tensors; ``beside``: what else the file holds and was not read, with its kind.
    """

    state: dict[str, Tensor]
    format: str
    files: tuple[Path, ...]
    wrapper: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)


def read_published(path: Path) -> Published:
    """Read a published file of weights, or a folder with one, perhaps in parts.

    Raises MissingInputError when it is not there, ConversionError for one that contains code, is damaged, or is no file
    of weights.
    """
    files = _files(path)
    state: dict[str, Tensor] = {}
    found = Published(state, "", tuple(files))
    for file in files:
        found = _read(file)
        twice = state.keys() & found.state.keys()
        if twice:
            raise ConversionError(f"{file}: {min(twice)} is in another part, too")
        state.update(found.state)
    if state and all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
    return Published(state, found.format, tuple(files), found.wrapper, found.beside)


def _files(path: Path) -> list[Path]:
    """The files that hold the weights."""
    if path.is_file():
        return [path]
    for name in FILES:
        index = path / f"{name}.index.json"
        if index.is_file():
            return [path / part for part in _parts(index)]
        if (path / name).is_file():
            return [path / name]
    raise MissingInputError(f"{path}: no such file, and no folder with {', '.join(FILES[:-1])} or {FILES[-1]}")


def _parts(index: Path) -> list[str]:
    if index.stat().st_size > MAX_INDEX:
        raise ConversionError(f"{index} has more than {MAX_INDEX} bytes: no index of weights")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if not PART.fullmatch(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{index} is no index of weights: {type(error).__name__}: {error}"[:500]) from error
    if wrong:
        raise ConversionError(f"{index} names {wrong[0]!a}, which is no file beside it")
    return names


def _read(path: Path) -> Published:
    """One file, by what it is rather than what it is called."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(512)
        if start[:2] == b"PK":
            return _read_zip(path, file)
    if start[8:9] == b"{":
        return Published(_checked(_safetensors(path), path), "safetensors", (path,))
    raise ConversionError(
        f"{path} {_named(start)}; expected safetensors, .npz, or a .pth written by torch 1.6 or later"
    )


def _named(start: bytes) -> str:
    """What a file that is not read is, by its first bytes."""
    if start[257:262] == b"ustar":
        return "is a tar, as torch wrote before 1.6, with a pickle inside, which can contain code"
    kinds = {
        b"\x80": "a bare pickle, as torch wrote before 1.6: it can contain code",
        b"\x93NUMPY": "a single array",
        b"\x89HDF": "HDF5",
        b"\x1f\x8b": "compressed by gzip",
    }
    return "is " + next((kind for magic, kind in kinds.items() if start.startswith(magic)), "no file of weights")


# ---------------------------------------------------------------------------------------------------------- safetensors


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_RECORDS:
                raise ConversionError(f"{path} has {len(names)} tensors, expected at most {MAX_RECORDS}")
            for name in names:
                yield name, file.get_tensor(name).clone()  # the file may change
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged: {error}"[:500] + "; fetch it again") from error


def _checked(tensors: Iterator[tuple[str, Tensor]], path: Path) -> dict[str, Tensor]:
    """Tensors by name; names can be printed, and numbers are of a kind that models have."""
    state = {}
    for name, tensor in tensors:
        if not isinstance(name, str) or not name.isprintable():
            raise ConversionError(f"{path}: a tensor is named {name!a:.200}, which is no name of a weight")
        if tensor.dtype not in DTYPES:
            raise ConversionError(f"{path}: {name} is of {tensor.dtype}, which no model here has")
        state[name] = tensor
    return state


# ------------------------------------------------------------------------------------------------------------- archives


def _read_zip(path: Path, file: BinaryIO) -> Published:
    """A zip: NumPy's or torch's, by the names of its records."""
    archive = Archive(path, file, unread=SCRIPT)
    names = archive.records.keys()
    archive.check()
    if names and all(name.endswith(".npy") for name in names):
        arrays = ((name.removesuffix(".npy"), _array(archive, name)) for name in names)
        return Published(_checked(arrays, path), "npz", (path,))
    return _read_torch(archive)


def _array(archive: Archive, name: str) -> Tensor:
    """An array of an ``.npz``: plain numbers, as many as its header says."""
    where, content = f"{archive.path}: {name}", archive.read(name)
    width = {1: 2, 2: 4, 3: 4}.get(content[6]) if content[:6] == b"\x93NUMPY" and len(content) > 12 else None
    if width is None:
        raise ConversionError(f"{where} is no array")
    start = 8 + width
    end = start + int.from_bytes(content[8:start], "little")
    try:
        if end - start > MAX_HEADER:
            raise ValueError(f"a header of {end - start} bytes")
        header = ast.literal_eval(content[start:end].decode("latin-1").strip())
        dtype, shape, columns = np.dtype(str(header["descr"])), header["shape"], header["fortran_order"]
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConversionError(f"{where} has a damaged header: {type(error).__name__}: {error}"[:500]) from error
    if dtype.kind not in NUMPY_KINDS or dtype.byteorder == ">" or dtype.itemsize > 8:
        raise ConversionError(f"{where} is of {dtype}, expected plain little-endian numbers: objects would be code")
    whole = isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS
    whole = whole and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not whole or math.prod(shape) * dtype.itemsize != len(content) - end:
        raise ConversionError(f"{where} says shape {shape!a:.200} of {dtype}, its data are {len(content) - end} bytes")
    array = np.frombuffer(content, dtype, offset=end).reshape(shape, order="F" if columns else "C")
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise ConversionError(f"{where} is of {dtype}, which torch has not") from error


def _read_torch(archive: Archive) -> Published:
    """What `torch.save` or `torch.jit.save` wrote, its pickle read as a description."""
    path, root = archive.path, next(iter(archive.records), "").partition("/")[0]
    known = {f"{root}/{name}" for name in TOLD}
    script = [name for name in archive.records if SCRIPT.fullmatch(name)]
    known |= {name for name in script if name.startswith(f"{root}/")}
    other = [name for name in archive.records if name not in known and not DATA.fullmatch(name)]
    if other or f"{root}/data.pkl" not in archive.records:
        raise ConversionError(f"{path} holds {(other or ['no data.pkl'])[0]}: it is not what torch.save writes")
    order = f"{root}/byteorder"
    if order in archive.records and archive.read(order) != b"little":
        raise ConversionError(f"{path} was written on a big-endian machine; save it again on another")
    pickle = f"{root}/data.pkl"
    content, inert = describe(bytes(archive.read(pickle)), f"{path}: {pickle}", script=bool(script))
    described, wrapper, beside = _scripted(content, path, script) if script else _unwrapped(content, path)
    beside |= {name: f"{count} times, not made" for name, count in inert.items()}
    kind = "torchscript" if script else "torch"
    return Published(_checked(_tensors(described, archive, root), path), kind, (path,), wrapper, beside)


def _scripted(content: Any, path: Path, script: list[str]) -> tuple[dict[Any, Any], str, dict[str, str]]:
    """The tensors of a TorchScript file, that nothing is around them, and what is beside them."""
    if not isinstance(content, Module):
        raise ConversionError(f"{path} contains code: {script[0]} (TorchScript), and no module; expected weights alone")
    found, other = flattened(content, str(path))
    if not found:
        raise ConversionError(f"{path} holds no weights: its modules have no tensors")
    beside = {name: f"an attribute, {count} times" for name, count in other.items()}
    return found, "", {**beside, "code and constants": f"{len(script)} records, not read"}


def _unwrapped(content: Any, path: Path) -> tuple[dict[Any, Any], str, dict[str, str]]:
    """The entries that are weights, under which name they were, and what is beside them."""
    entries = content if isinstance(content, dict) else {}
    wrapper = next((name for name in WRAPPERS if _holds_tensors(entries.get(name))), "")
    found = entries[wrapper] if wrapper else entries
    if not _holds_tensors(found):
        raise ConversionError(f"{path} holds no weights, neither directly nor under {', '.join(WRAPPERS)}")
    return found, wrapper, {str(name): _kind(value) for name, value in entries.items() if wrapper and name != wrapper}


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(x, Stored) for x in value.values())


def _kind(value: Any) -> str:
    if isinstance(value, Inert | Stored):
        return value.name if isinstance(value, Inert) else "a tensor"
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, dict | list | tuple) else "")


def _tensors(described: Mapping[Any, Any], archive: Archive, root: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors from their storages; those that share one share its memory."""
    storages: dict[str, Tensor] = {}
    made: dict[Stored, Tensor] = {}
    left = MOST_SHARED * archive.size
    for name, stored in described.items():
        where = f"{archive.path}: {name!a:.200}"
        if not isinstance(stored, Stored):
            raise ConversionError(f"{where} is {_kind(stored)}, expected a tensor")
        if stored not in made:
            storage = stored.storage
            _check(stored, where)
            if storage.key not in storages:
                storages[storage.key] = _storage(storage, archive, f"{root}/data/{storage.key}")
            if storages[storage.key].dtype != storage.dtype:
                raise ConversionError(f"{where} is of {storage.dtype}, the storage it shares is not")
            left -= math.prod(stored.shape) * storage.dtype.itemsize
            if left < 0:
                raise ConversionError(f"{where}: tensors share memory, and make more than {MOST_SHARED} times the file")
            made[stored] = storages[storage.key].as_strided(stored.shape, stored.stride, stored.offset)
        yield name, made[stored]


def _check(stored: Stored, where: str) -> None:
    """A tensor must lie within its storage, and have no more numbers than that."""
    count = math.prod(stored.shape)
    last = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
    if count > stored.storage.size or (count and last >= stored.storage.size) or max(stored.shape, default=0) >= 2**31:
        raise ConversionError(
            f"{where} has shape {stored.shape}, strides {stored.stride} from {stored.offset} on: "
            f"that is not within its storage of {stored.storage.size}"
        )


def _storage(storage: Storage, archive: Archive, name: str) -> Tensor:
    """All numbers of a storage, one dimension."""
    if name not in archive.records:
        raise ConversionError(f"{archive.path}: no record {name!a:.200}")
    size = archive.records[name].size
    if size != storage.size * storage.dtype.itemsize:
        raise ConversionError(f"{archive.path}: {name} has {size} bytes, expected {storage.size} of {storage.dtype}")
    if not size:
        return torch.empty(0, dtype=storage.dtype)
    content = torch.frombuffer(archive.read(name), dtype=torch.uint8).clone()  # in memory aligned as any tensor's
    if storage.dtype == torch.bool and content.max() > 1:
        raise ConversionError(f"{archive.path}: {name} holds other bytes than those of true and false")
    return content.view(storage.dtype)
