"""Weights in safetensors files: written whole or in numbered parts, read back strictly."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multiway.errors import CheckpointError, MissingInputError

SHARD_BYTES = 5 * 10**9
"""Weights beyond this size are written in several files."""
LISTED = 5
"""Keys named in an error before the rest is only counted."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as ``model.safetensors``, or beyond SHARD_BYTES in parts with an index, as the hub has them.

    Files of earlier weights are removed. Tensors that share memory are written as often as they are named.
    """
    for old in folder.iterdir():
        if old.name in (WEIGHTS, INDEX) or PART.fullmatch(old.name):
            old.unlink()
    parts: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, tensor in state.items():
        if parts[-1] and sizes[-1] + tensor.nbytes > SHARD_BYTES:
            parts.append({})
            sizes.append(0)
        parts[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names if len(parts) > 1 else [WEIGHTS], parts, strict=True):
        whole = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in part.items()
        }
        write(folder / name, lambda path, whole=whole: save_file(whole, path, metadata={"format": "pt"}))
    if len(parts) > 1:
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        write(folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8"))


def read_weights(folder: Path, like: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Read the weights of a folder to ``device``, in the dtypes they were saved in; they do not depend on the files.

    ``like``: every name and shape there must be, as a state dict, perhaps on the meta device.

    Raises MissingInputError without a file, CheckpointError when one is damaged or names and shapes differ.
    """
    state: dict[str, Tensor] = {}
    for name in _parts(folder):
        path = folder / name
        if not path.is_file():
            raise MissingInputError(f"{path}: no such weights")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  not a mapping
                    # a copy, because the file may change, and in memory aligned as any tensor's, for equal results
                    state[key] = file.get_tensor(key).to(device, copy=True)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error
    differences = unlike(state, like)
    if differences:
        raise CheckpointError(f"the weights in {folder} do not fit the model: {differences}")
    return state


def unlike(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str:
    """How names and shapes of a state dict differ from those expected, in words; empty when they do not."""
    kinds = {
        "missing": [f"{k} {tuple(like[k].shape)}" for k in like if k not in state],
        "unexpected": [f"{k} {tuple(state[k].shape)}" for k in state if k not in like],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(like[k].shape)}"
            for k in like
            if k in state and state[k].shape != like[k].shape
        ],
    }
    return "; ".join(f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys)


def write(path: Path, make: Callable[[Path], Any], tag: str = "") -> None:
    """Write a file by ``make(path)`` under a temporary name, sync it, and give it its name.

    ``tag``: part of the temporary name, different for each of several processes that write the same file. Raises
    OSError when the disk refuses.
    """
    temporary = path.with_name(f".tmp-{tag}{path.name}")
    try:
        make(temporary)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _parts(folder: Path) -> list[str]:
    """The files a folder's weights lie in. Raises CheckpointError for an index that is not one."""
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if all(PART.fullmatch(name) for name in names):
            return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights: {type(error).__name__}: {error}") from error
    raise CheckpointError(
        f"{index} names files other than model-00001-of-00002.safetensors and the like: {names[:LISTED]}"
    )


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:LISTED]) + (f" and {len(keys) - LISTED} more" if len(keys) > LISTED else "")
