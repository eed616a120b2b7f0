"""Where the tokens of a batch lie: one matrix of real tokens, modality by modality, and the sequences among them.

Every modality's real tokens form one contiguous block of rows, without padding, in the order
``image of image-only | image of pairs | text of pairs | text of text-only``, so that the vision expert, the language
expert and the vision-language expert each own ONE slice of the matrix and run one GEMM per projection. Only attention
sees the samples: each kind of sample is a `Group`, gathered to (B, N, D) and padded to its longest.

A plan is made once, when the batch is collated, on the CPU; sizes are Python ints, indices are tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multiway.errors import ConfigError


class Segment(NamedTuple):
    """A run of rows of one modality in one kind of sample."""

    modality: str
    kind: str
    samples: int
    rows: int


@dataclass(frozen=True)
class Group:
    """The sequences of one kind of sample, among whose tokens attention runs.

    ``kind``; ``rows``: how many rows of the matrix it owns; ``samples`` B; ``length`` N, its longest sequence.
    ``index``: int64 (B * N,), the group's row at every place of the padded layout (0 at padding), or None when the
    rows already are the layout. ``inverse``: int64 (rows,), the place of every row. ``keep``: bool (B, 1, 1 or N, N),
    True = query may attend to key, or None when every token sees every other.
    """

    kind: str
    rows: int
    samples: int
    length: int
    index: Tensor | None
    inverse: Tensor | None
    keep: Tensor | None


@dataclass(frozen=True)
class Plan:
    """The layout of one batch.

    ``segments`` in row order; ``groups`` in row order; ``position``: int64 (R,), place of each row in its own
    modality's sequence, from 0; ``sample``: int64 (R,), number of each row's sample in the batch (image-only samples
    first, then pairs, then text-only); ``starts``: modality -> int64 (B,), row of the first token of each sequence.
    """

    segments: tuple[Segment, ...]
    groups: tuple[Group, ...]
    position: Tensor
    sample: Tensor
    starts: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        """Number of real tokens in the batch."""
        return sum(segment.rows for segment in self.segments)

    @property
    def samples(self) -> int:
        """Number of samples of all kinds."""
        return sum(group.samples for group in self.groups)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the batch, in row order."""
        return tuple(dict.fromkeys(segment.modality for segment in self.segments))

    def extent(self, modality: str) -> tuple[int, int]:
        """First row and one past the last row of a modality; (0, 0) when the batch has none of it."""
        start = 0
        for name, rows in self.runs(self.modalities):
            if name == modality:
                return start, start + rows
            start += rows
        return 0, 0

    def part(self, modality: str, kind: str) -> int:
        """Number of rows of a modality in one kind of sample."""
        return sum(s.rows for s in self.segments if (s.modality, s.kind) == (modality, kind))

    def runs(self, experts: Sequence[str]) -> list[tuple[str, int]]:
        """Split the rows among experts: (expert, number of consecutive rows), in row order.

        A segment goes to the expert named after its kind of sample if there is one and the kind is joint, else to
        the one of its modality, else to ``"shared"``.
        """
        runs: list[tuple[str, int]] = []
        for modality, kind, _, rows in self.segments:
            joint = kind not in (modality,) and kind in experts
            name = kind if joint else modality if modality in experts else "shared"
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1] + rows)
            else:
                runs.append((name, rows))
        return runs

    def equal_length(self, modality: str) -> int | None:
        """Tokens of every sequence of a modality that only samples of one kind have, alone and all equally long."""
        own = [segment for segment in self.segments if segment.modality == modality]
        groups = [group for group in self.groups if group.kind == own[0].kind]
        alone = len(own) == len(groups) == 1 and own[0].rows == groups[0].rows
        return groups[0].length if alone and groups[0].index is None else None

    def of(self, kind: str) -> Plan:
        """The plan of the samples of one kind alone."""
        before = list(itertools.takewhile(lambda group: group.kind != kind, self.groups))
        group = self.groups[len(before)]
        start, first = sum(g.rows for g in before), sum(g.samples for g in before)
        segments = tuple(s for s in self.segments if s.kind == kind)
        starts = {}
        for name in (s.modality for s in segments):
            earlier = sum(s.samples for s in self.segments[: self.segments.index(segments[0])] if s.modality == name)
            starts[name] = self.starts[name][earlier : earlier + group.samples] - start
        rows = slice(start, start + group.rows)
        return Plan(segments, (group,), self.position[rows], self.sample[rows] - first, starts)

    def texts(self) -> Plan:
        """The plan of all texts, each a sample of kind ``text``, whatever it is read with here.

        Made of sizes and tensors where they are, without a look at their values; so all pairs must have equally many
        other tokens, as their pictures have. Raises ValueError for pairs whose texts are causal.
        """
        start, stop = self.extent("text")
        first, position = self.starts["text"] - start, self.position[start:stop]
        sample = torch.searchsorted(first, torch.arange(stop - start, device=first.device), right=True) - 1
        segments, groups, row, count = [], [], 0, 0
        for own in (s for s in self.segments if s.modality == "text"):
            group = next(g for g in self.groups if g.kind == own.kind)
            if group.rows > own.rows:
                if group.keep is not None and group.keep.shape[2] > 1:
                    raise ValueError(f"texts of {own.kind!r} see what is before them: their plan is causal")
                length = group.length - (group.rows - own.rows) // own.samples
                rows = slice(row, row + own.rows)
                group = _padded(own, length, (sample[rows] - count) * length + position[rows])
            groups.append(dataclasses.replace(group, kind="text"))
            segments.append(own._replace(kind="text"))
            row, count = row + own.rows, count + own.samples
        return Plan(tuple(segments), tuple(groups), position, sample, {"text": first})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        """Return the plan with its tensors on ``device``."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Plan:
        """Return the plan with its tensors in pinned memory (the loader asks for it)."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, fn: Callable[[Tensor], Tensor]) -> Plan:
        """The plan with ``fn`` applied to every tensor."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else fn(x)

        groups = tuple(
            dataclasses.replace(g, index=moved(g.index), inverse=moved(g.inverse), keep=moved(g.keep))
            for g in self.groups
        )
        starts = {name: fn(x) for name, x in self.starts.items()}
        return Plan(self.segments, groups, fn(self.position), fn(self.sample), starts)


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a batch and their plan: what an encoder returns and every head reads.

    ``values``: (R, D), one row per real token.
    """

    values: Tensor
    plan: Plan

    def prefix(self, modality: str) -> Tensor:
        """First token of every sequence of a modality (the class token): (B, D)."""
        return self.values.index_select(0, self.plan.starts[modality])

    def mean(self, modality: str, skip: int = 0) -> Tensor:
        """Mean of the tokens of every sequence of a modality, without its first ``skip``: (B, D)."""
        values, pad = self.dense(modality)
        if self.plan.equal_length(modality):
            return values[:, skip:].mean(1)
        keep = ~pad[:, skip:, None]
        return (values[:, skip:] * keep).sum(1) / keep.sum(1)

    def rows(self, index: Tensor) -> Tensor:
        """The rows at ``index`` (M,): (M, D)."""
        return self.values.index_select(0, index)

    def dense(self, modality: str) -> tuple[Tensor, Tensor]:
        """A modality as a padded batch: values (B, N, D), zero at padding, and pad (B, N), True = padding."""
        start, stop = self.plan.extent(modality)
        if length := self.plan.equal_length(modality):
            values = self.values[start:stop].view(-1, length, self.values.shape[1])
            return values, torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
        first = self.plan.starts[modality] - start
        position = self.plan.position[start:stop]
        sequence = torch.searchsorted(first, torch.arange(stop - start, device=first.device), right=True) - 1
        length = int(position.max()) + 1
        values = self.values.new_zeros(len(first), length, self.values.shape[1])
        values = values.index_put((sequence, position), self.values[start:stop])
        pad = torch.ones(len(first), length, dtype=torch.bool, device=first.device)
        return values, pad.index_put((sequence, position), torch.zeros((), dtype=torch.bool, device=first.device))


def _padded(segment: Segment, length: int, place: Tensor) -> Group:
    """The group of sequences of at most ``length`` tokens; ``place``: int64 (rows,), of every row in their layout."""
    total = segment.samples * length
    if segment.rows == total:
        return Group(segment.kind, segment.rows, segment.samples, length, None, None, None)
    index = torch.zeros(total, dtype=torch.int64, device=place.device)
    index = index.index_copy(0, place, torch.arange(segment.rows, device=place.device))
    keep = torch.zeros(total, dtype=torch.bool, device=place.device)
    keep = keep.index_fill(0, place, True).view(segment.samples, 1, 1, length)
    return Group(segment.kind, segment.rows, segment.samples, length, index, place, keep)


def dense_tokens(x: Tensor, modality: str = "image") -> Tokens:
    """Sequences of equal length, (B, N, D), as tokens."""
    count, length, _ = x.shape
    rows = count * length
    number, place = torch.arange(count, device=x.device), torch.arange(length, device=x.device)
    plan = Plan(  # that of `make_plan`, made where the tokens are
        (Segment(modality, modality, count, rows),),
        (Group(modality, rows, count, length, None, None, None),),
        place.repeat(count),
        number.repeat_interleave(length),
        {modality: number * length},
    )
    return Tokens(x.flatten(0, 1), plan)


Lengths = Sequence[int] | np.ndarray


def plan_of(pictures: int | None, tokens: int, texts: Sequence[Tensor] | None, longest: int) -> Plan:
    """The plan of so many pictures of ``tokens`` tokens each, of texts, or where both are given of pairs.

    Raises ConfigError for neither, and for a text of more than ``longest`` tokens.
    """
    lengths: dict[str, Lengths] = {}
    if pictures is not None:
        lengths["image"] = [tokens] * pictures
    if texts is not None:
        lengths["text"] = [len(ids) for ids in texts]
        if (found := max(lengths["text"])) > longest:
            raise ConfigError(f"a text has {found} tokens, this model reads at most {longest}")
    if not lengths:
        raise ConfigError("encode needs pictures, texts, or as many of both")
    return make_plan({"pair" if len(lengths) == 2 else next(iter(lengths)): lengths})


def make_plan(kinds: Mapping[str, Mapping[str, Lengths]], *, causal_text: bool = False) -> Plan:
    """Lay out a batch.

    ``kinds``: for every kind of sample, the number of tokens of each of its modalities, per sample; modalities of a
    joint kind in the order of the joint sequence. The canonical order is that of the mapping, for instance
    ``{"image": {"image": [17, 17]}, "pair": {"image": [17], "text": [9]}, "text": {"text": [12, 5]}}``; kinds without
    samples are left out. ``causal_text``: text tokens see the whole image and the text up to themselves, image tokens
    see the image alone (captioning).

    Raises ValueError when the modalities of a kind disagree about the number of samples, a length is below 1, or the
    rows of a modality would not be contiguous in this order of kinds.
    """
    segments: list[Segment] = []
    groups: list[Group] = []
    positions: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    starts: dict[str, list[np.ndarray]] = {}
    rows = first_sample = 0
    for kind, modalities in kinds.items():
        lengths = {name: np.asarray(n, dtype=np.int64) for name, n in modalities.items()}
        sizes = {len(n) for n in lengths.values()}
        if len(sizes) != 1 or any((n < 1).any() for n in lengths.values()):
            raise ValueError(f"plan of {kind!r}: every modality needs one length >= 1 per sample, got {lengths}")
        count = sizes.pop()
        if count == 0:
            continue
        group_samples, group_positions = [], []
        for name, n in lengths.items():
            begin = np.cumsum(n) - n
            group_samples.append(np.repeat(np.arange(count), n))
            group_positions.append(np.arange(n.sum()) - np.repeat(begin, n))
            starts.setdefault(name, []).append(begin + rows)
            segments.append(Segment(name, kind, count, int(n.sum())))
            rows += int(n.sum())
        groups.append(_group(kind, list(lengths.items()), group_samples, group_positions, causal_text))
        positions += group_positions
        samples += [s + first_sample for s in group_samples]
        first_sample += count
    if causal_text and any(list(names)[-1] != "text" for names in kinds.values() if "text" in names):
        raise ValueError("causal text must come last in the joint sequence, after what it sees")
    order = [s.modality for i, s in enumerate(segments) if i == 0 or segments[i - 1].modality != s.modality]
    if len(order) != len(set(order)):
        raise ValueError(f"kinds in the order {list(kinds)} scatter a modality over the rows ({order}); reorder them")
    return Plan(
        tuple(segments),
        tuple(groups),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(samples)),
        {name: torch.from_numpy(np.concatenate(x)) for name, x in starts.items()},
    )


def _group(
    kind: str,
    lengths: list[tuple[str, np.ndarray]],
    samples: list[np.ndarray],
    positions: list[np.ndarray],
    causal_text: bool,
) -> Group:
    """Index, inverse and visibility of one kind's sequences; all None where the rows already are (B, N)."""
    total = np.sum([n for _, n in lengths], axis=0)
    count, longest, rows = len(total), int(total.max()), int(total.sum())
    ragged = rows != count * longest
    before = np.zeros(count, np.int64)  # tokens of earlier modalities in each sample's joint sequence
    places = []
    for (_, n), sample, position in zip(lengths, samples, positions, strict=True):
        places.append(sample * longest + before[sample] + position)
        before = before + n
    inverse = np.concatenate(places)
    keep = None
    if ragged:
        keep = (np.arange(longest) < total[:, None])[:, None, None, :]
    if causal_text and any(name == "text" for name, _ in lengths):
        image = np.zeros(count, np.int64) + sum(n for name, n in lengths if name != "text")
        query, key = np.arange(longest)[:, None], np.arange(longest)
        sees = (key < image[:, None, None]) | ((key <= query) & (query >= image[:, None, None]))
        keep = sees[:, None] if keep is None else sees[:, None] & keep
    if len(lengths) == 1 and not ragged:
        return Group(kind, rows, count, longest, None, None, None if keep is None else torch.from_numpy(keep))
    index = np.zeros(count * longest, np.int64)
    index[inverse] = np.arange(rows)
    return Group(
        kind,
        rows,
        count,
        longest,
        torch.from_numpy(index),
        torch.from_numpy(inverse),
        None if keep is None else torch.from_numpy(np.ascontiguousarray(keep)),
    )
