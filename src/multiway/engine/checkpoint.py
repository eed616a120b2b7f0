"""Checkpoints: directories of safetensors and JSON that are either whole or not there.

``step-000001200/`` holds, for every group of tensors ("model", "optim", ...), the rows each rank owns
(``GROUP-RANK-of-WORLD.safetensors``), ``state.json``, and ``MANIFEST.json``: every file with its size and SHA-256, and
for every tensor its dtype, its shape and which file holds which rows. It is written under a name that starts with
``.tmp-``, synced, and renamed, so a name of the form ``step-%09d`` never stands for half a checkpoint; what decays
afterwards is found by the manifest, which also seals itself. Any number of processes can read what any other number
wrote. Nothing in it can execute.

The ranks act together: what fails on one is raised on all. Whoever calls ``save`` or ``newest`` holds the run's lock.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from multiway.errors import CheckpointError, ConfigError, MultiwayError, WriteError

T = TypeVar("T")
Part = dict[str, tuple[Tensor, int]]  # what one file holds: tensor name -> (rows, number of the first)

_VERSION = 1
_MANIFEST, _STATE = "MANIFEST.json", "state.json"
_STEP, _BAD = re.compile("step-([0-9]{9})"), re.compile("bad-step-[0-9]{9}(-[0-9]+)?")
_ASIDE = ".tmp-aside-"
_FILE_BYTES = 4 << 30  # what a rank holds of a group is split into files of about this size
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified.

    ``path``: its directory; ``step``; ``state``: the JSON values given to ``save``; ``groups``: group -> tensor name ->
    ``{"dtype", "shape", "rows": [[file, first row, one past the last], ...]}``.
    """

    path: Path
    step: int
    state: dict[str, Any]
    groups: Mapping[str, Mapping[str, Any]]

    def load(self, group: str, into: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, each rank its own rows; ``into`` names exactly the tensors of the group.

        Raises CheckpointError, before anything is filled, when names, shapes or dtypes differ.
        """
        stored = self.groups.get(group)
        if stored is None:
            raise CheckpointError(f"{self.path}: expected group {group!r}, found only {list(self.groups)}")
        if stored.keys() != into.keys():
            absent, unknown = sorted(into.keys() - stored.keys()), sorted(stored.keys() - into.keys())
            raise CheckpointError(
                f"{self.path}: group {group!r} has not the tensors of this run: {len(absent)} are absent {absent[:5]}, "
                f"{len(unknown)} are unknown {unknown[:5]}"
            )
        for name, tensor in into.items():
            expected, found = _describe(tensor), {key: stored[name][key] for key in ("dtype", "shape")}
            if found != expected:
                raise CheckpointError(f"{self.path}: {group} tensor {name!r}: expected {expected}, found {found}")
        try:
            with ExitStack() as stack:
                opened = cache(lambda file: stack.enter_context(safe_open(self.path / file, framework="pt")))
                for name, tensor in into.items():
                    if not _fill(name, tensor, stored[name]["rows"], opened):
                        raise CheckpointError(f"{self.path}: {group} tensor {name!r}: expected all rows, found gaps")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: group {group!r} cannot be read: {error}") from error


def save(
    folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write ``folder/step-%09d`` and remove older checkpoints, so that ``keep`` whole ones stay; return its path.

    ``groups``: group -> name -> tensor, the same names on every rank; plain tensors are equal on all ranks and stored
    by rank 0, DTensors (placements Shard(0) and Replicate) by the ranks that own their rows. ``state``: JSON values.
    A checkpoint of the same step is replaced. Whole means here: the manifest is, and all files have their sizes.

    Raises WriteError naming the path, the bytes needed and the bytes free; what was there before is still there.
    ConfigError, before anything is written, for a placement or dtype that cannot be stored.
    """
    if keep < 1:
        raise ConfigError(f"keep = {keep}: at least 1 checkpoint has to be kept, 2 if one may be damaged")
    text = json.dumps(state, indent=1).encode()
    entries = {g: {n: {**_describe(x), "rows": []} for n, x in tensors.items()} for g, tensors in groups.items()}
    folder = Path(folder)
    temp, target = folder / f".tmp-step-{step:09d}", folder / f"step-{step:09d}"
    parts = {name: part for group, tensors in groups.items() for name, part in _parts(group, tensors)}
    needed = sum(_together(lambda: sum(local.nbytes for part in parts.values() for local, _ in part.values())))
    try:
        _first(lambda: _prepare(folder, temp, needed))
        written = _together(lambda: _write_parts(temp, parts))
        _first(lambda: _finish(temp, step, entries, text, written))
        _first(lambda: _publish(temp, target))
        _first(lambda: _purge(folder, step, keep))
    except OSError as error:
        if _rank() == 0:
            shutil.rmtree(temp, ignore_errors=True)
        free = f"{shutil.disk_usage(folder).free:,}" if folder.is_dir() else "unknown"
        raise WriteError(
            f"{folder}: cannot save step {step}: {error}; {needed:,} bytes are needed, {free} are free. Checkpoints "
            "saved before are untouched: free some space or make the folder writable"
        ) from error
    return target


def newest(folder: Path, *, note: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None when there has never been one; call it on every rank.

    A damaged one is reported through ``note`` (on rank 0), renamed to ``bad-...``, and the one before it is taken.
    Only names are trusted, never a time stamp or a symbolic link; what else lies in the folder is noted and ignored.

    Raises CheckpointError when there were checkpoints and none is whole: a run never starts afresh by accident.
    """
    folder = Path(folder)
    try:
        steps, bad = _first(lambda: _scan(folder, note))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    faults: dict[Path, str] = {}
    for step in steps:
        path = folder / f"step-{step:09d}"
        try:
            manifest, state = _verify(path)
        except CheckpointError as error:
            faults[path] = str(error)
            continue
        for rejected, fault in faults.items() if _rank() == 0 else ():
            note(f"checkpoint {rejected.name} rejected: {fault}; using {path.name}")
            _mark_bad(rejected, note)
        return Checkpoint(path, step, state, manifest["groups"])
    told = [f"{path.name} rejected: {fault}" for path, fault in faults.items()] + [f"{n} rejected before" for n in bad]
    if told:
        raise CheckpointError(f"{folder}: no checkpoint is whole: {'; '.join(told)}. Move them away to start afresh")
    return None


def _fill(name: str, tensor: Tensor, rows: list[Any], opened: Callable[[str], Any]) -> bool:
    """Copy the rows of this rank from the files that hold them; whether all were there."""
    local, start, _ = _local(tensor)
    filled, stop = start, start + _count(local)
    for file, first, last in rows:
        low, high = max(first, start), min(last, stop)
        if low >= high:
            continue
        if local.dim():
            local[low - start : high - start] = opened(file).get_slice(name)[low - first : high - first]
        else:
            local.copy_(opened(file).get_tensor(name))
        filled += high - low
    return filled == stop


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _together(work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank: the results of all in rank order, or on every rank the error of any."""
    value, failure = None, None
    try:
        value = work()
    except (MultiwayError, OSError) as error:
        failure = error
    own = (value, failure and (type(failure), str(failure)))
    everyone: list[Any] = [own] * _world()
    if _world() > 1:
        dist.all_gather_object(everyone, own)
    if failure:
        raise failure
    for _, other in everyone:
        if other:
            raise other[0](other[1])
    return [value for value, _ in everyone]


def _first(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 alone: its result, or its error, on every rank."""
    return _together(lambda: work() if _rank() == 0 else None)[0]  # type: ignore[return-value]


def _count(tensor: Tensor) -> int:
    """Number of rows; a scalar is one."""
    return tensor.shape[0] if tensor.dim() else 1


def _local(tensor: Tensor) -> tuple[Tensor, int, bool]:
    """The rows of a tensor on this rank, the number of the first, and whether this rank is the one to store them."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, 0, _rank() == 0
    start, stop, stores = 0, _count(tensor), True
    mesh = tensor.device_mesh
    for size, index, placement in zip(mesh.shape, mesh.get_coordinate() or (), tensor.placements, strict=True):
        if type(placement) is Shard and placement.dim == 0:
            rows = -(-(stop - start) // size)  # the last ranks have fewer, or none
            start, stop = min(start + index * rows, stop), min(start + (index + 1) * rows, stop)
        elif type(placement) is Replicate:
            stores = stores and index == 0
        else:
            raise ConfigError(f"a tensor placed as {placement} cannot be stored, only Shard(0) and Replicate()")
    local = tensor.to_local()
    assert _count(local) == stop - start, (local.shape, start, stop)
    return local, start, stores


def _parts(group: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
    """The files this rank writes for a group, by name."""
    parts: list[Part] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so that all are aligned
        local, start, stores = _local(tensor)
        if not stores or not _count(local):
            continue
        if parts[-1] and size + local.nbytes > _FILE_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = (local, start)
        size += local.nbytes
    for number, part in enumerate(parts if parts[0] else ()):
        yield f"{group}-{_rank():05d}-of-{_world():05d}{f'.{number}' if number else ''}.safetensors", part


def _describe(tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype not in _DTYPES:
        raise ConfigError(f"a tensor of {tensor.dtype} cannot be stored, only of {', '.join(_DTYPES.values())}")
    return {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}


# --- writing ----------------------------------------------------------------------------------------------------------


def _at(point: str) -> None:
    """Do nothing; tests replace it to crash at a named point of ``save``."""


def _prepare(folder: Path, temp: Path, needed: int) -> None:
    """Clear what interrupted saves left, check the space, make the temporary directory."""
    folder.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    for left in folder.glob(".tmp-*"):
        _remove(left)
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    temp.mkdir()
    _at("made")


def _write_parts(temp: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Write this rank's files: file -> (size and hash, tensor -> its first row and one past its last)."""
    written = {}
    for file, part in parts.items():
        record = _write(temp / file, _safetensors({name: local for name, (local, _) in part.items()}))
        written[file] = (record, {name: (start, start + _count(local)) for name, (local, start) in part.items()})
    _at("written")
    return written


def _write(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write a new file from byte buffers and sync it: its size and hash."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """A safetensors file in pieces, so that no more than one tensor is copied at a time."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {**_describe(tensor), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _finish(temp: Path, step: int, entries: dict[str, Any], state: bytes, written: list[Any]) -> None:
    """Write the state and the manifest, with the rows of all ranks filled in."""
    files = {_STATE: _write(temp / _STATE, [state])}
    for file, (record, rows) in itertools.chain(*(rank.items() for rank in written)):
        files[file] = record
        for name, (start, stop) in rows.items():
            entries[file.rsplit("-", 3)[0]][name]["rows"].append((file, start, stop))
    for name, entry in itertools.chain(*(group.items() for group in entries.values())):
        entry["rows"].sort(key=lambda row: row[1])
        bounds = [0, *itertools.chain(*(row[1:] for row in entry["rows"])), (entry["shape"] or [1])[0]]
        assert bounds[::2] == bounds[1::2], f"the ranks do not hold every row of {name!r} once: {entry}"
    manifest = {"version": _VERSION, "step": step, "world": len(written), "files": files, "groups": entries}
    _write(temp / _MANIFEST, [_seal(manifest)])
    _sync(temp)
    _at("manifest")


def _seal(manifest: Mapping[str, Any]) -> bytes:
    """The only valid bytes of a manifest: its JSON with the hash of that JSON as the last value."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}).encode()


def _publish(temp: Path, target: Path) -> None:
    """Give a finished checkpoint its name; one that has it already goes aside first, never under."""
    aside = target.with_name(_ASIDE + target.name)
    if os.path.lexists(target):
        target.rename(aside)
        _at("aside")
    temp.rename(target)
    _sync(target.parent)
    _at("renamed")
    _remove(aside)


def _recover(folder: Path) -> None:
    """Give a checkpoint that went aside its name back where the new one never got it."""
    for aside in folder.glob(_ASIDE + "*"):
        target = folder / aside.name.removeprefix(_ASIDE)
        if not os.path.lexists(target):
            aside.rename(target)


def _purge(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than the newest ``keep`` whole ones; those that are not whole neither count nor go."""
    older = [folder / f"step-{s:09d}" for s in _scan(folder, lambda _: None)[0] if s < step]
    for path in [path for path in older if _is_whole(path)][keep - 1 :]:
        _remove(path.rename(folder / f".tmp-purge-{path.name}"))
    _at("purged")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- verifying --------------------------------------------------------------------------------------------------------


def _scan(folder: Path, note: Callable[[str], None]) -> tuple[list[int], list[str]]:
    """Steps that have a directory, newest first, and the names of those rejected before."""
    steps: list[int] = []
    bad: list[str] = []
    if not folder.is_dir():
        return steps, bad
    _recover(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        step, directory = _STEP.fullmatch(entry.name), entry.is_dir(follow_symlinks=False)
        if step and directory:
            steps.append(int(step[1]))
        elif _BAD.fullmatch(entry.name) and directory:
            bad.append(entry.name)
        else:
            note(f"{folder / entry.name} ignored: not the directory of a checkpoint")
    return steps[::-1], bad


def _verify(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and state of a checkpoint whose every byte is right, hashed by all ranks together.

    Raises CheckpointError on every rank: ``FILE, expected X, found Y``.
    """
    manifest = _first(lambda: _inspect(path))
    files = list(manifest["files"].items())[_rank() :: _world()]
    _together(lambda: [_check_hash(path / name, record["sha256"]) for name, record in files])
    return manifest, _first(lambda: json.loads((path / _STATE).read_bytes()))


def _inspect(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, with the right sizes."""
    try:
        if (path / _MANIFEST).is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link")
        raw = (path / _MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except OSError as error:
        raise CheckpointError(f"{_MANIFEST}, expected a readable file, found: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{_MANIFEST}, expected JSON, found: {error}") from error
    sealed = isinstance(manifest, dict) and manifest.pop("sha256", None)
    if not sealed or _seal(manifest) != raw:
        raise CheckpointError(f"{_MANIFEST}, expected content with the SHA-256 it states, found other content")
    expected, found = (_VERSION, path.name), (manifest["version"], f"step-{manifest['step']:09d}")
    if expected != found:
        raise CheckpointError(f"{_MANIFEST}, expected version and step {expected}, found {found}")
    for name, record in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() and not file.is_symlink() else "no file with any"
        if found != record["bytes"]:
            raise CheckpointError(f"{name}, expected {record['bytes']} bytes, found {found}")
    return manifest


def _is_whole(path: Path) -> bool:
    try:
        _inspect(path)
    except CheckpointError:
        return False
    return True


def _check_hash(path: Path, expected: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path.name}, expected a readable file, found: {error.strerror}") from error
    if found != expected:
        raise CheckpointError(f"{path.name}, expected SHA-256 {expected}, found {found}")


def _mark_bad(path: Path, note: Callable[[str], None]) -> None:
    """Rename a rejected checkpoint for its owner to look at; where that is refused the run goes on all the same."""
    names = (path.with_name(f"bad-{path.name}{end}") for end in ["", *(f"-{n}" for n in range(1, 1000))])
    try:
        path.rename(next(name for name in names if not os.path.lexists(name)))
    except OSError as error:
        note(f"{path} stays: {error}")
