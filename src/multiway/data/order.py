"""Which record stands at which position, and every other random choice, as pure functions of integers.

Nothing here is state: a cache may be thrown away at any time, so resuming is arithmetic, and the order depends on no
process, rank or worker.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

GROUP = 1 << 16
"""Records that are permuted together when an order has blocks: what one process holds of an epoch."""


def fold(seed: int, *keys: int | str) -> int:
    """Hash a seed and keys to 128 bits, the same on every machine and version; other keys give an unrelated number."""
    text = "\0".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """Random generator of its own for a seed and keys, for instance ``(seed, "view", epoch, record)``.

    Equal arguments give equal streams, different ones independent streams. About 10 microseconds.
    """
    return np.random.Generator(np.random.Philox(key=fold(seed, *keys)))


def permutation(n: int, seed: int, *keys: int | str) -> np.ndarray:
    """Random permutation of 0 .. n - 1 for a seed and keys: int64 (n,).

    It sorts Philox's raw stream, which NumPy promises to keep; ``Generator.permutation`` may change with a release,
    and a run must find its order again after an upgrade.
    """
    return np.argsort(generator(seed, *keys).bit_generator.random_raw(n), kind="stable")


class Order:
    """A random order of ``n`` records, a new one every epoch, that never ends.

    ``blocks``: sizes of consecutive runs of records (shards), in record order, or None. With blocks an epoch permutes
    the blocks, cuts them into groups of about 65,536 records and permutes the records of each group, so that reads stay
    near each other and only one group is in memory; without, all records form one group.

    Raises ValueError when n is below 1 or the blocks do not add up to it.
    """

    def __init__(self, n: int, seed: int, blocks: Sequence[int] | None = None) -> None:
        self._sizes = np.asarray([n] if blocks is None else blocks, dtype=np.int64)
        if n < 1 or (self._sizes < 0).any() or self._sizes.sum() != n:
            raise ValueError(f"cannot order {n} records in blocks of {self._sizes.tolist()}")
        self.n = n
        self.seed = seed
        self._first = np.cumsum(self._sizes) - self._sizes  # record at the head of every block
        self._dtype = np.uint32 if n <= 1 << 32 else np.int64
        self._epoch: int | None = None  # the epoch and the group that are laid out now
        self._group: int | None = None

    def index(self, position: int) -> tuple[int, int]:
        """Epoch and record at a position: any integer >= 0; positions of one epoch are n consecutive integers."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            self._lay_out_epoch(epoch)
        group = bisect_right(self._begins, place) - 1
        if group != self._group:
            self._lay_out_group(epoch, group)
        return epoch, int(self._records[place - self._begins[group]])

    def _lay_out_epoch(self, epoch: int) -> None:
        """Permute the blocks; those whose first record falls into the same 65,536 places form a group."""
        self._blocks = permutation(len(self._sizes), self.seed, "blocks", epoch)
        sizes = self._sizes[self._blocks]
        begins = np.cumsum(sizes) - sizes
        heads = np.flatnonzero(np.diff(begins // GROUP, prepend=-1))  # first block of every group
        self._begins: list[int] = begins[heads].tolist()
        self._heads: list[int] = [*heads.tolist(), len(sizes)]
        self._epoch, self._group = epoch, None

    def _lay_out_group(self, epoch: int, group: int) -> None:
        """Permute the records of one group."""
        blocks = self._blocks[self._heads[group] : self._heads[group + 1]]
        runs = [
            np.arange(first, first + size, dtype=self._dtype)
            for first, size in zip(self._first[blocks], self._sizes[blocks], strict=True)
        ]
        records = np.concatenate(runs)
        self._records = records[permutation(len(records), self.seed, "records", epoch, group)]
        self._group = group
