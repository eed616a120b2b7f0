"""Renaming weights between ours and a published family's layout: rules as data, both ways, strict and lossless."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from multiway.errors import ConversionError

LISTED = 10
"""Keys named in an error before the rest is only counted."""
FIELD = re.compile(r"\{(\w+)(\*?)\}")


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """How a family of weight files names what we name otherwise.

    ``rules``: (our key, their key, ...); a ``{field}`` stands for one part between dots, a ``{field*}`` for any number
    of them, and is the same on both sides; several of their keys are equal slices of our tensor along dimension 0, in
    order. ``words``: for a field whose values differ, our word -> theirs. ``squeezed``: our keys whose dimensions
    of size 1 theirs have not: a single number, which could not be sharded, or a lone vector. ``transposed``: our keys
    of matrices that theirs hold transposed. ``ones``: our keys, ``{field}`` as above -> how many
    dimensions of size 1 theirs has behind ours (negative: in front of ours), as those of a 1x1 convolution.
    ``dropped``: their keys, ``{field}`` as above, that carry nothing we need, such as buffers of indices. ``prefix``:
    what stands before their names in some files and not in others, such as "vit."; the rules have it. ``config``:
    settings of ours that a file of this layout means, whatever the model is called.
    """

    rules: Sequence[tuple[str, ...]]
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    squeezed: Sequence[str] = ()
    transposed: Sequence[str] = ()
    ones: Mapping[str, int] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    prefix: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def names(self, key: str) -> list[str]:
        """Their names for our ``key``, one per slice; empty when no rule knows it."""
        for pattern, theirs in self._rules:
            if match := pattern.fullmatch(key):
                return [FIELD.sub(partial(self._value, match), name) for name in theirs]
        return []

    def drops(self, key: str) -> bool:
        """Whether their ``key`` carries nothing we need."""
        return any(pattern.fullmatch(key) for pattern in self._dropped)

    def shape(self, key: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Their shape of what we hold under ``key`` in this ``shape``, before it is sliced."""
        count = next((count for pattern, count in self._ones if pattern.fullmatch(key)), 0)
        if key in self.squeezed:
            return tuple(n for n in shape if n != 1)
        return (1,) * -count + tuple(reversed(shape) if key in self.transposed else shape) + (1,) * count

    def _value(self, match: re.Match[str], place: re.Match[str]) -> str:
        """Their word for what a field stood for."""
        return self.words.get(place[1], {}).get(match[place[1]], match[place[1]])

    @cached_property
    def _rules(self) -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
        return [(self._pattern(ours), tuple(theirs)) for ours, *theirs in self.rules]

    @cached_property
    def _dropped(self) -> list[re.Pattern[str]]:
        return [self._pattern(theirs) for theirs in self.dropped]

    @cached_property
    def _ones(self) -> list[tuple[re.Pattern[str], int]]:
        return [(self._pattern(ours), count) for ours, count in self.ones.items()]

    def _pattern(self, template: str) -> re.Pattern[str]:
        """The regular expression of a template; a field with words takes only those."""
        parts = FIELD.split(template)  # text, field, star, text, field, star, ..., text
        result = re.escape(parts[0])
        for name, star, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            words = "|".join(map(re.escape, self.words.get(name, ()))) or (".+" if star else "[^.]+")
            result += f"(?P<{name}>{words}){re.escape(text)}"
        return re.compile(result)


def to_theirs(state: Mapping[str, Tensor], weights: WeightMap) -> dict[str, Tensor]:
    """Our state dict under their names; slices of a fused tensor are copies, the rest are the same tensors.

    What their files carry and we drop is not made. Raises ConversionError when no rule explains a key or a tensor
    cannot be sliced evenly.
    """
    result: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        names = weights.names(key)
        shape = weights.shape(key, value.shape)
        if not names or (len(names) > 1 and (not shape or shape[0] % len(names))):
            unknown.append(f"{key} {_shape(value)}")
            continue
        value = value.T.contiguous() if key in weights.transposed else value.reshape(shape)
        parts = [value] if len(names) == 1 else [part.clone() for part in value.chunk(len(names))]
        assert result.keys().isdisjoint(names), f"two rules lead to one of {names}"
        result.update(zip(names, parts, strict=True))
    if unknown:
        raise ConversionError(f"cannot write {_listed(unknown)}: no rule of this family explains them")
    return result


def faults(state: Mapping[str, Tensor], weights: WeightMap, like: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps their state dict from being one of ours: every key with its shape, by kind; empty when nothing does.

    ``like``: as in `to_ours`. Raises ConversionError when this family has no such model.
    """
    expected = to_theirs(like, weights)
    found = {
        "missing": [f"{k} {_shape(v)}" for k, v in expected.items() if k not in state],
        "unexpected": [f"{k} {_shape(v)}" for k, v in state.items() if k not in expected and not weights.drops(k)],
        "of another shape": [
            f"{k} {_shape(state[k])} instead of {_shape(v)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    return {kind: keys for kind, keys in found.items() if keys}


def to_ours(state: Mapping[str, Tensor], weights: WeightMap, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our names, in the order of ``like``.

    ``like``: our keys with tensors of the shapes wanted, for instance the state dict of a model on the meta device.
    Values keep their dtype. Raises ConversionError naming every missing, unexpected and misshapen key of theirs.
    """
    wrong = faults(state, weights, like)
    if wrong:
        found = "; ".join(f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in wrong.items())
        raise ConversionError(f"these weights do not fit the model: {found}. Choose the size and heads they belong to")
    result = {}
    for key in like:
        parts = [state[name] for name in weights.names(key)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        result[key] = (whole.T if key in weights.transposed else whole).reshape(like[key].shape)
    return result


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - LISTED
    return ", ".join(keys[:LISTED]) + (f" and {more} more" if more > 0 else "")
