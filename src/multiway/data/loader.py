"""Batches of an optimiser step, by arithmetic from its number, here or in worker processes.

Step s takes the positions [s * items, (s + 1) * items) of every kind of sample, wherever it is computed: its parts
(micro-batches times processes) are contiguous slices of them, and workers hold no state. So a run continues after a
kill, on another number of processes or workers, with the very same batches.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypedDict

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from multiway.data.mixture import Concatenation, Mixture, Place, mix
from multiway.data.order import fold
from multiway.errors import ConfigError, DataError, MultiwayError, RecordError
from multiway.types import Batch

SUBSTITUTES = 8
"""Records tried in the place of a bad one before the source is called unusable."""

POLL_SECONDS = 1.0
"""How often a process that waits for a batch looks whether its workers live."""


class Source(Protocol):
    """Indexed records of one kind of sample."""

    def __len__(self) -> int: ...

    @property
    def blocks(self) -> Sequence[int] | None:
        """Sizes of its shards in record order; None = in one piece."""
        ...

    def key(self, record: int, /) -> str:
        """Name of a record for messages."""
        ...


class Fault(TypedDict):
    """A record that could not be loaded: a line of the quarantine."""

    kind: str
    source: int
    record: int
    key: str
    reason: str
    message: str
    step: int


Load = Callable[[str, int, int, int], Any]
"""``load(kind, source, record, epoch)``: a sample, or RecordError."""

Collate = Callable[[dict[str, list[Any]]], Batch]
"""``collate(samples by kind)``: the batch."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One kind of sample: its sources as one endless sequence, of which every step takes ``items``.

    ``weights``: share of each source, or None: every record once per epoch. ``items``: samples per optimiser step over
    all micro-batches and processes, 0 = the kind is left out.
    """

    kind: str
    sources: Sequence[Source]
    weights: Sequence[float] | None = None
    items: int
    seed: int

    @cached_property
    def sequence(self) -> Concatenation | Mixture:
        """Position -> `Place`; raises DataError when there is no source or an empty one, else as ``mix``."""
        sizes = [len(source) for source in self.sources]
        if not sizes or 0 in sizes:
            which = f"source {sizes.index(0)} has no record" if sizes else "there is no source"
            raise DataError(f"{self.kind}: {which}; index it again, take it out, or set the kind's items to 0")
        blocks = [source.blocks for source in self.sources]
        return mix(sizes, self.weights, fold(self.seed, self.kind), blocks)

    def places(self, step: int, part: int = 0, parts: int = 1) -> list[Place]:
        """The records of one part of a step, in order; raises ConfigError when the step has no such parts."""
        size, rest = divmod(self.items, parts)
        if rest:
            raise ConfigError(
                f"{self.kind}: {self.items} items a step cannot be shared by {parts} micro-batches x processes: "
                f"{self.items} = {parts} x {size} + {rest}. Take a multiple, for instance {parts * (size + 1)}"
            )
        first = step * self.items + part * size
        return [self.sequence.index(position) for position in range(first, first + size)]


class Batches:
    """The batch of every (step, part), a pure function of the two.

    ``streams``: one per kind of sample; ``load`` and ``collate`` see nothing but what the batch needs. ``shares``: of
    steps by kind, which then hold one kind each, in a random order of which every 1,000 steps have exactly these
    shares; None = every step holds all kinds.
    Raises ConfigError when no kind has items, a kind occurs twice, or shares name other kinds than have items.
    """

    def __init__(
        self, streams: Sequence[Stream], load: Load, collate: Collate, shares: Mapping[str, float] | None = None
    ) -> None:
        self.streams = tuple(stream for stream in streams if stream.items > 0)
        self.load = load
        self.collate = collate
        self.shares = shares
        kinds = [stream.kind for stream in self.streams]
        if not kinds or len(set(kinds)) < len(kinds):
            raise ConfigError(f"kinds of sample with items: {kinds}; expected at least one, each once")
        if shares is not None and set(shares) != set(kinds):
            raise ConfigError(f"shares of steps are given for {sorted(shares)}, expected one for each of {kinds}")

    @cached_property
    def _turns(self) -> Mixture | None:
        """Whose turn a step is, and how many it had before: kinds of one record each."""
        if self.shares is None:
            return None
        weights = [self.shares[stream.kind] for stream in self.streams]
        return Mixture([1] * len(weights), weights, fold(self.streams[0].seed, "shares"), [None] * len(weights))

    def due(self, step: int) -> list[tuple[Stream, int]]:
        """The streams a step takes from, each with the number of steps before that did."""
        if self._turns is None:
            return [(stream, step) for stream in self.streams]
        kind, before = self._turns.turn(step)
        return [(self.streams[kind], before)]

    def items(self, step: int) -> int:
        """Samples of a step over all its parts."""
        return sum(stream.items for stream, _ in self.due(step))

    def places(self, step: int, part: int = 0, parts: int = 1) -> dict[str, list[Place]]:
        """Where the samples of one part of a step come from, by kind; raises ConfigError as `Stream.places`."""
        return {stream.kind: stream.places(turn, part, parts) for stream, turn in self.due(step)}

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Batch, list[Fault]]:
        """The batch of one part of a step, and the records that could not be loaded for it.

        A bad record is replaced by the next good one of its source. Raises DataError when 8 substitutes are bad too.
        """
        faults: list[Fault] = []
        samples: dict[str, list[Any]] = {}
        for stream, turn in self.due(step):
            places = stream.places(turn, part, parts)
            samples[stream.kind] = [self._sample(stream, place, step, faults) for place in places]
        return self.collate(samples), faults

    def _sample(self, stream: Stream, place: Place, step: int, faults: list[Fault]) -> Any:
        source = stream.sources[place.source]
        tries = min(1 + SUBSTITUTES, len(source))
        for record in ((place.record + k) % len(source) for k in range(tries)):
            try:
                return self.load(stream.kind, place.source, record, place.epoch)
            except RecordError as error:
                fault = Fault(
                    kind=stream.kind,
                    source=place.source,
                    record=record,
                    key=source.key(record),
                    reason=error.reason,
                    message=str(error),
                    step=step,
                )
                faults.append(fault)
        raise DataError(
            f"{stream.kind}: {tries} records in a row of source {place.source} cannot be loaded, from record "
            f"{place.record} (key {source.key(place.record)!r}) on; the last: {faults[-1]['message']}. Expected good "
            "records as indexed: the source or its storage is damaged, check and index it again"
        )


class FaultWindow:
    """Counts the bad records among the last ones and stops the run when they are too many.

    ``max_bad_fraction``: of the last ``window`` records; before so many were seen, the missing ones count as good.
    ``counts``: bad records by reason, since the start.
    """

    def __init__(self, max_bad_fraction: float = 0.01, window: int = 10_000) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.window = window
        self.counts: Counter[str] = Counter()
        self._recent: deque[tuple[int, Sequence[Fault]]] = deque()  # records and faults of every batch in the window
        self._seen = self._bad = 0

    def add(self, records: int, faults: Sequence[Fault]) -> None:
        """Note the good records and the faults of a batch; raises DataError above the limit."""
        self.counts.update(fault["reason"] for fault in faults)
        self._recent.append((records + len(faults), faults))
        self._seen += records + len(faults)
        self._bad += len(faults)
        while self._seen - self._recent[0][0] >= self.window:
            seen, old = self._recent.popleft()
            self._seen -= seen
            self._bad -= len(old)
        over = max(self._seen, self.window)
        if self._bad > self.max_bad_fraction * over:
            bad = [fault for _, some in self._recent for fault in some]
            reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(f["reason"] for f in bad).most_common())
            raise DataError(
                f"{len(bad)} of the last {over} records are bad ({reasons}), expected at most max_bad_fraction = "
                f"{self.max_bad_fraction:g} of them. The last: {bad[-1]['message']}. All are listed in the quarantine: "
                "repair the data and index it again"
            )


def iterate(
    batches: Batches,
    steps: range,
    *,
    micros: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    timeout: float = 120.0,
    prefetch: int = 2,
    pin: bool = False,
) -> Iterator[tuple[Batch, list[Fault]]]:
    """Batch and faults of every micro-batch of every step of one process, in order.

    ``micros``: micro-batches per step; ``rank``, ``world``: this process and how many there are; ``workers``: loader
    processes, 0 = load here; ``timeout``: seconds to wait for one batch of a worker; ``prefetch``: batches each worker
    prepares ahead; ``pin``: return tensors in pinned memory. The batches do not depend on the last four.

    Raises ConfigError at once when a step cannot be shared so; DataError when a batch cannot be loaded, or when a
    worker dies or exceeds the timeout, naming the worker and what it was loading.
    """
    for stream in batches.streams:
        stream.places(0, 0, micros * world)
    dataset = _MicroBatches(batches, steps, micros, rank, world, workers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(len(dataset)),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        pin_memory=pin,
        timeout=min(POLL_SECONDS, timeout) if workers else 0,
        prefetch_factor=prefetch if workers else None,
        generator=torch.Generator(),  # its seed is unused, and the global generator stays untouched
    )
    return _deliver(loader, dataset, timeout)


class _MicroBatches(Dataset):
    """The micro-batches of one process by number, and a ledger of what each worker is loading."""

    def __init__(self, batches: Batches, steps: range, micros: int, rank: int, world: int, workers: int) -> None:
        self.batches = Batches(batches.streams, self._load, batches.collate, batches.shares)
        self.steps, self.micros, self.rank, self.world = steps, micros, rank, world
        self._inner_load = batches.load
        self._kinds = [stream.kind for stream in batches.streams]
        # per worker: number of the micro-batch, kind, source, record; -1 = none
        self._ledger = torch.full((workers, 4), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.steps) * self.micros

    def __getitem__(self, number: int) -> tuple[Batch, list[Fault]] | MultiwayError:
        """An error of ours is returned, not raised: so it crosses from a worker with its own message."""
        self._note(number, -1, -1, -1)
        self._number = number
        try:
            return self.batches.batch(*self.part(number))
        except MultiwayError as error:
            return error
        finally:
            self._note(-1, -1, -1, -1)

    def part(self, number: int) -> tuple[int, int, int]:
        """Step, part and number of parts of a micro-batch."""
        step, micro = divmod(number, self.micros)
        return self.steps[step], micro * self.world + self.rank, self.micros * self.world

    def in_flight(self, worker: int) -> str:
        """What a worker is loading, in words."""
        number, kind, source, record = self._ledger[worker].tolist()
        if number < 0:
            return "between two batches"
        step, part, _ = self.part(number)
        if kind < 0:
            return f"at step {step}, part {part}"
        stream = self.batches.streams[kind]
        key = stream.sources[source].key(record)
        return f"at step {step}, part {part}, in {stream.kind} record {record} (key {key!r}) of source {source}"

    def _load(self, kind: str, source: int, record: int, epoch: int) -> Any:
        self._note(self._number, self._kinds.index(kind), source, record)
        return self._inner_load(kind, source, record, epoch)

    def _note(self, *row: int) -> None:
        worker = get_worker_info()
        if worker is not None:
            self._ledger.numpy()[worker.id] = row


def _deliver(loader: DataLoader, dataset: _MicroBatches, timeout: float) -> Iterator[tuple[Batch, list[Fault]]]:
    """Yield the results in order, watching the workers."""
    # torch installs a handler that raises wherever the main process is when a worker dies, be it inside an optimiser
    # step or a save; we look for dead workers while we wait for them instead
    handler = signal.getsignal(signal.SIGCHLD)
    results: Any = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    workers: Sequence[BaseProcess] = getattr(results, "_workers", ())
    try:
        for number in range(len(dataset)):
            result = _next(results, workers, dataset, number, timeout)
            if isinstance(result, MultiwayError):
                raise result
            batch, faults = result
            yield batch, faults
    finally:
        if workers:  # an error that is kept would keep them alive
            results._shutdown_workers()


def _next(
    results: Iterator[Any], workers: Sequence[BaseProcess], dataset: _MicroBatches, number: int, timeout: float
) -> Any:
    """The next result, or a DataError that names the worker which died or is late."""
    start = time.monotonic()
    while True:
        try:
            return next(results)
        except (RuntimeError, EOFError, OSError) as error:
            if not isinstance(error, RuntimeError):  # perhaps tensors of a worker that is dying this moment
                for worker in workers:
                    worker.join(POLL_SECONDS / len(workers))
            dead = [i for i, worker in enumerate(workers) if not worker.is_alive()]
            if dead:
                raise _died(workers, dead[0], dataset) from error
            if not str(error).startswith("DataLoader timed out"):
                raise
            if time.monotonic() - start >= timeout:
                raise _hangs(workers, number, dataset, timeout) from error


def _died(workers: Sequence[BaseProcess], i: int, dataset: _MicroBatches) -> DataError:
    code = workers[i].exitcode
    how = f"of {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit status {code}"
    return DataError(
        f"loader worker {i} (pid {workers[i].pid}) died {how} {dataset.in_flight(i)}. SIGKILL is mostly a lack of "
        "memory, SIGBUS a full /dev/shm; otherwise set workers to 0 to see the error itself, and take the record out "
        "if it is the cause"
    )


def _hangs(workers: Sequence[BaseProcess], number: int, dataset: _MicroBatches, timeout: float) -> DataError:
    """The error of a batch that does not come; its worker is killed."""
    late = number % len(workers)  # batches are dealt to the workers in turn
    step, part, _ = dataset.part(number)
    error = DataError(
        f"no batch for step {step}, part {part} after {timeout:g} s: loader worker {late} (pid {workers[late].pid}) "
        f"hangs {dataset.in_flight(late)}. Check the storage and that record, or raise the timeout"
    )
    workers[late].kill()  # a stopped process ignores the SIGTERM that the loader would send
    return error


def _start_worker(worker: int) -> None:
    """Leave signals to the main process, which finishes its step and saves, then tells us to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unchanged(result: Any) -> Any:
    return result
