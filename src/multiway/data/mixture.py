"""Several sources of one kind of sample as one endless sequence: position -> (source, epoch, record) by arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from multiway.data.order import Order, fold, permutation
from multiway.errors import ConfigError

SLOTS = 1000
"""Positions after which the shares of a mixture repeat: weights are honoured to a thousandth."""

CHUNK = 4096
"""Records of the blocks a source without shards is cut into when it is concatenated with one that has shards."""

Blocks = Sequence[Sequence[int] | None]


class Place(NamedTuple):
    """Where a sample comes from: number of the source, its epoch in that source, number of the record."""

    source: int
    epoch: int
    record: int


class Concatenation:
    """All sources as if they were one: an epoch holds every record of every source exactly once.

    ``sizes``: records of each source, all >= 1; ``blocks``: shard sizes of each source, or None for those without.
    """

    def __init__(self, sizes: Sequence[int], seed: int, blocks: Blocks) -> None:
        self._first = [sum(sizes[:i]) for i in range(len(sizes))]
        flat = None
        if any(block is not None for block in blocks):
            flat = [n for size, block in zip(sizes, blocks, strict=True) for n in (block or _chunks(size))]
        self._order = Order(sum(sizes), seed, flat)

    def index(self, position: int) -> Place:
        """The record at a position >= 0."""
        epoch, record = self._order.index(position)
        source = bisect_right(self._first, record) - 1
        return Place(source, epoch, record - self._first[source])


class Mixture:
    """Sources in fixed shares: of every 1,000 positions source i owns ``slots[i]``, in an order of their own.

    ``sizes`` and ``blocks`` as in `Concatenation`; ``weights``: finite, >= 0, not all 0, in any unit. Shares are
    rounded by the largest remainder, and every positive weight keeps at least one position. Each source runs through
    its own order without gap, its epochs end when its own records do.

    Raises ConfigError for weights that cannot be honoured.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, blocks: Blocks) -> None:
        if len(weights) != len(sizes):
            raise ConfigError(f"{len(weights)} weights for {len(sizes)} sources: give one weight per source")
        self.slots = shares(weights)
        self.seed = seed
        self._orders = [Order(n, fold(seed, "source", i), blocks[i]) for i, n in enumerate(sizes)]
        self._block: int | None = None  # the block of positions that is laid out now

    def index(self, position: int) -> Place:
        """The record at a position >= 0."""
        source, place = self.turn(position)
        return Place(source, *self._orders[source].index(place))

    def turn(self, position: int) -> tuple[int, int]:
        """Source at a position, and how many positions that source had before."""
        block, slot = divmod(position, SLOTS)
        if block != self._block:
            owners = np.repeat(np.arange(len(self.slots)), self.slots)
            self._owners = owners[permutation(SLOTS, self.seed, "slots", block)]
            self._block = block
        source = int(self._owners[slot])
        return source, block * self.slots[source] + int(np.count_nonzero(self._owners[:slot] == source))


def mix(
    sizes: Sequence[int], weights: Sequence[float] | None, seed: int, blocks: Blocks | None = None
) -> Concatenation | Mixture:
    """One sequence of all sources: by weights, or each record once per epoch when ``weights`` is None."""
    blocks = [None] * len(sizes) if blocks is None else blocks
    return Concatenation(sizes, seed, blocks) if weights is None else Mixture(sizes, weights, seed, blocks)


def shares(weights: Sequence[float], slots: int = SLOTS) -> list[int]:
    """Divide ``slots`` positions by weight: largest remainder, ties to the first, at least 1 for a positive weight.

    Raises ConfigError when a weight is negative or not finite, all are 0, or there are more sources than slots.
    """
    positive = sum(w > 0 for w in weights)
    if not all(math.isfinite(w) and w >= 0 for w in weights) or positive == 0:
        raise ConfigError(f"weights {list(weights)}: expected finite numbers >= 0, at least one above 0")
    if positive > slots:
        raise ConfigError(f"{positive} sources with a weight: a mixture holds at most {slots}; join some of them")
    exact = [Fraction(float(w)) for w in weights]
    total = sum(exact)
    quotas = [slots * w / total for w in exact]
    given = [max(math.floor(q), int(q > 0)) for q in quotas]
    while missing := slots - sum(given):
        step = 1 if missing > 0 else -1
        open_to = [i for i, g in enumerate(given) if quotas[i] and g + step > 0]
        given[max(open_to, key=lambda i: step * (quotas[i] - given[i]))] += step
    return given


def _chunks(n: int) -> list[int]:
    """Cut n records into blocks, so that shuffling blocks spreads them over the epoch."""
    return [min(CHUNK, n - start) for start in range(0, n, CHUNK)]
