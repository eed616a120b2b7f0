"""Renaming weights between ours and a published family's layout: rules as data, both ways, strict and lossless."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multiway.errors import ConversionError

LISTED = 10
"""Keys named in an error before the rest is only counted."""


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """How a family of weight files names what we name otherwise.

    ``rules``: (our key, their key, ...); a ``{field}`` stands for one part between dots and is the same on both sides;
    several of their keys are equal slices of our tensor along dimension 0, in order. ``words``: for a field whose
    values differ, our word -> theirs. ``numbers``: our keys that have one row where theirs is a single number (which
    could not be sharded).
    """

    rules: Sequence[tuple[str, ...]]
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    numbers: Sequence[str] = ()

    def names(self, key: str) -> list[str]:
        """Their names for our ``key``, one per slice; empty when no rule knows it."""
        for ours, *theirs in self.rules:
            match = re.fullmatch(self._pattern(ours), key)
            if match:
                values = {name: self.words.get(name, {}).get(value, value) for name, value in match.groupdict().items()}
                return [name.format(**values) for name in theirs]
        return []

    def _pattern(self, template: str) -> str:
        """The regular expression of a template; a field with words takes only those."""
        parts = re.split(r"\{(\w+)\}", template)
        for i, name in enumerate(parts):
            words = "|".join(map(re.escape, self.words.get(name, ()))) or "[^.]+"
            parts[i] = f"(?P<{name}>{words})" if i % 2 else re.escape(name)
        return "".join(parts)


def to_theirs(state: Mapping[str, Tensor], weights: WeightMap) -> dict[str, Tensor]:
    """Our state dict under their names; slices of a fused tensor are copies, the rest are the same tensors.

    Raises ConversionError when no rule explains a key or a tensor cannot be sliced evenly.
    """
    result: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        names = weights.names(key)
        if not names or (len(names) > 1 and (value.ndim == 0 or len(value) % len(names))):
            unknown.append(f"{key} {_shape(value)}")
            continue
        value = value.reshape(()) if key in weights.numbers else value
        parts = [value] if len(names) == 1 else [part.clone() for part in value.chunk(len(names))]
        assert result.keys().isdisjoint(names), f"two rules lead to one of {names}"
        result.update(zip(names, parts, strict=True))
    if unknown:
        raise ConversionError(f"cannot write {_listed(unknown)}: no rule of this family explains them")
    return result


def to_ours(state: Mapping[str, Tensor], weights: WeightMap, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our names, in the order of ``like``.

    ``like``: our keys with tensors of the shapes wanted, for instance the state dict of a model on the meta device.
    Values keep their dtype. Raises ConversionError naming every missing, unexpected and misshapen key of theirs.
    """
    expected = to_theirs(like, weights)
    faults = {
        "missing": [f"{k} {_shape(v)}" for k, v in expected.items() if k not in state],
        "unexpected": [f"{k} {_shape(v)}" for k, v in state.items() if k not in expected],
        "of another shape": [
            f"{k} {_shape(state[k])} instead of {_shape(v)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in faults.items() if keys)
        raise ConversionError(f"these weights do not fit the model: {found}. Choose the size and heads they belong to")
    result = {}
    for key in like:
        parts = [state[name] for name in weights.names(key)]
        result[key] = parts[0].reshape(like[key].shape) if len(parts) == 1 else torch.cat(parts)
    return result


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - LISTED
    return ", ".join(keys[:LISTED]) + (f" and {more} more" if more > 0 else "")
