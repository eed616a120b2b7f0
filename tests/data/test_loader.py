"""Batches by arithmetic: exact under any split into micro-batches, processes and workers; bad records are reported."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multiway.data.loader import SUBSTITUTES, Batches, Fault, FaultWindow, Stream, iterate
from multiway.data.mixture import Place
from multiway.data.order import generator
from multiway.errors import ConfigError, DataError, RecordError


@dataclass(frozen=True)
class Records:
    """A source of numbered records."""

    size: int
    blocks: tuple[int, ...] | None = None

    def __len__(self):
        return self.size

    def key(self, record):
        return f"key-{record}"


def load(kind, source, record, epoch):
    """A sample drawn from all it may depend on."""
    return torch.from_numpy(generator(1, kind, source, epoch, record).random(3))


def collate(samples):
    return {kind: torch.stack(list(drawn)) for kind, drawn in samples.items()}


def stream(kind="text", sizes=(10,), items=4, weights=None, seed=0):
    return Stream(kind=kind, sources=[Records(n) for n in sizes], items=items, weights=weights, seed=seed)


def two_kinds(loading=load):
    return Batches([stream("image", (13,), 8), stream("text", (9, 30), 4, [1, 2])], loading, collate)


def joined(batches, step, parts):
    """The whole step, put together from its parts."""
    pieces = [batches.batch(step, part, parts)[0] for part in range(parts)]
    return {kind: torch.cat([piece[kind] for piece in pieces]) for kind in pieces[0]}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- arithmetic


@settings(max_examples=60)
@given(
    size=st.integers(1, 17),
    parts=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=12, max_size=12),
    start=st.integers(0, 1000),
)
def test_changing_the_number_of_processes_consumes_every_record_once_per_epoch(size, parts, start):
    """12 items a step, every step split otherwise (2 -> 1 -> 2 processes and more), sizes that divide nothing."""
    texts = stream(sizes=(size,), items=12)
    steps = range(start * size, start * size + 12)  # from the first record of an epoch
    places = [
        place for step, split in zip(steps, parts) for part in range(split) for place in texts.places(step, part, split)
    ]
    assert places == [place for step in steps for place in texts.places(step)]
    counts = Counter((place.epoch, place.record) for place in places)
    assert set(counts.values()) == {1}
    whole_epochs = range(12 * start, 12 * start + len(places) // size)
    assert counts.keys() >= {(epoch, record) for epoch in whole_epochs for record in range(size)}


@pytest.mark.parametrize(("micros", "world"), [(1, 4), (2, 2), (4, 1)])
def test_micro_batches_times_processes_give_the_same_step_in_the_same_order(micros, world):
    batches = two_kinds()
    runs = [list(iterate(batches, range(3, 6), micros=micros, rank=rank, world=world)) for rank in range(world)]
    for i, step in enumerate(range(3, 6)):
        pieces = [runs[rank][i * micros + micro][0] for micro in range(micros) for rank in range(world)]
        whole = {kind: torch.cat([piece[kind] for piece in pieces]) for kind in pieces[0]}
        assert_same(whole, batches.batch(step)[0])


def test_every_part_holds_every_kind_in_equal_numbers():
    for part in range(4):
        places = two_kinds().places(5, part, 4)
        assert {kind: len(some) for kind, some in places.items()} == {"image": 2, "text": 1}


def test_places_say_what_is_loaded():
    batches = two_kinds()
    expected = [load("text", p.source, p.record, p.epoch) for p in batches.places(7, 1, 2)["text"]]
    assert torch.equal(batches.batch(7, 1, 2)[0]["text"], torch.stack(expected))


def test_kinds_with_one_seed_are_ordered_independently():
    batches = Batches([stream("image", (50,), 50), stream("text", (50,), 50)], load, collate)
    places = batches.places(0)
    assert places["image"] != places["text"]
    assert sorted(places["image"]) == sorted(places["text"]) == [Place(0, 0, record) for record in range(50)]


def test_shards_keep_reads_together():
    source = Records(3 << 16, blocks=(1 << 16,) * 3)
    places = Stream(kind="text", sources=[source], items=1 << 16, seed=0).places(1)
    assert len({place.record >> 16 for place in places}) == 1


def test_a_step_that_cannot_be_shared_is_refused_with_its_arithmetic():
    batches = Batches([stream("image", items=8), stream("text", items=30)], load, collate)
    with pytest.raises(ConfigError, match=r"text: 30 items .* by 4 micro-batches x processes: 30 = 4 x 7 \+ 2.* 32"):
        batches.batch(0, 0, 4)
    with pytest.raises(ConfigError, match="30 = 4 x 7"):
        iterate(batches, range(10), micros=2, world=2)  # at once, not at the first batch


def test_a_kind_without_items_is_left_out():
    batches = Batches([stream("image", sizes=(), items=0), stream("text")], load, collate)
    assert batches.batch(0)[0].keys() == {"text"}


def test_streams_that_give_no_batch_are_refused():
    with pytest.raises(ConfigError, match="at least one"):
        Batches([stream(items=0)], load, collate)
    with pytest.raises(ConfigError, match=r"\['text', 'text'\].*each once"):
        Batches([stream(), stream()], load, collate)
    with pytest.raises(DataError, match="text: source 1 has no record"):
        Batches([stream(sizes=(3, 0))], load, collate).batch(0)
    with pytest.raises(DataError, match="text: there is no source"):
        Batches([stream(sizes=())], load, collate).batch(0)


# --- one kind in every step

SHARES = {"image": 0.15, "pair": 0.7, "text": 0.15}


def taking_turns(loading=load, seed=0):
    streams = [stream(kind, (37,), items, seed=seed) for kind, items in (("image", 8), ("pair", 4), ("text", 4))]
    return Batches(streams, loading, collate, SHARES)


def test_every_step_holds_one_kind_in_the_shares_asked_for():
    batches = taking_turns()
    kinds = [next(iter(batches.places(step))) for step in range(2000)]
    assert all(len(batches.places(step)) == 1 for step in range(0, 2000, 97))
    for start in (0, 1000):
        assert Counter(kinds[start : start + 1000]) == {kind: 1000 * share for kind, share in SHARES.items()}
    assert kinds[:1000] != kinds[1000:]
    assert kinds != [next(iter(taking_turns(seed=1).places(step))) for step in range(2000)]
    assert [batches.items(step) for step in range(9)] == [
        {"image": 8, "pair": 4, "text": 4}[kind] for kind in kinds[:9]
    ]
    assert two_kinds().items(5) == 12


def test_no_kind_loses_or_repeats_a_record_while_others_have_their_turns():
    batches, seen = taking_turns(), {kind: [] for kind in SHARES}
    for step in range(1500):  # across the border at 1,000
        ((kind, places),) = batches.places(step).items()
        seen[kind] += places
    for kind, places in seen.items():
        whole = stream(kind, (37,), 1)
        assert places == [whole.places(i)[0] for i in range(len(places))]


@pytest.mark.parametrize("workers", [0, 2])
def test_turns_are_resumed_and_shared_exactly(workers, no_children):
    batches = taking_turns()
    want = [batches.batch(step)[0] for step in range(990, 1010)]
    whole = [batch for batch, _ in iterate(taking_turns(), range(990, 1010), workers=workers)]
    later = [batch for batch, _ in iterate(taking_turns(), range(1003, 1010), workers=workers)]
    for got, expected in zip([*whole, *later], [*want, *want[13:]], strict=True):
        assert_same(got, expected)
    for step in (990, 1001, 1007):
        assert_same(joined(batches, step, 4), batches.batch(step)[0])


def test_turns_that_cannot_be_are_refused():
    streams = [stream("image", items=8), stream("text", items=6)]
    for shares in ({"image": 1.0}, {"image": 1.0, "text": 1.0, "pair": 1.0}):
        with pytest.raises(ConfigError, match=r"shares of steps .* expected one for each of \['image', 'text'\]"):
            Batches(streams, load, collate, shares)
    with pytest.raises(ConfigError, match="text: 6 items"):  # whichever kind begins
        iterate(Batches(streams, load, collate, {"image": 1.0, "text": 1.0}), range(10), micros=4)


# --- bad records


def refusing(bad, calls=None):
    """A load that refuses the records of source 0 in ``bad`` and returns where the sample came from."""

    def attempt(kind, source, record, epoch):
        if record in bad:
            raise RecordError(f"shard.tar:key-{record}: cannot decode", reason="decode")
        return torch.tensor([source, record, epoch])

    return attempt


def test_a_bad_record_is_replaced_by_the_next_good_one_and_reported():
    bad = {0, 8, 9}
    batches = Batches([stream(sizes=(10,), items=10)], refusing(bad), collate)
    batch, faults = batches.batch(6)
    asked = [place.record for place in batches.places(6)["text"]]
    substitute = {8: 1, 9: 1, 0: 1}  # 9 -> 0 -> 1 wraps around
    assert batch["text"].tolist() == [[0, substitute.get(record, record), 6] for record in asked]
    tried = [r for record in asked for r in {8: [8, 9, 0], 9: [9, 0], 0: [0]}.get(record, [])]
    assert [fault["record"] for fault in faults] == tried
    assert faults[0] == Fault(
        kind="text",
        source=0,
        record=tried[0],
        key=f"key-{tried[0]}",
        reason="decode",
        message=f"shard.tar:key-{tried[0]}: cannot decode",
        step=6,
    )
    assert json.loads(json.dumps(faults)) == faults


@given(bad=st.sets(st.integers(0, 29), max_size=8), parts=st.sampled_from([2, 3, 5]))
def test_substitutes_depend_on_nothing_but_the_record(bad, parts):
    batches = Batches([stream(sizes=(30,), items=30)], refusing(bad), collate)
    whole, faults = batches.batch(2)
    assert_same(joined(batches, 2, parts), whole)
    assert [f for part in range(parts) for f in batches.batch(2, part, parts)[1]] == faults
    assert not bad & set(whole["text"][:, 1].tolist())
    assert {f["record"] for f in faults} == bad


def test_a_run_of_bad_records_stops_with_its_beginning_and_last_reason():
    assert SUBSTITUTES == 8
    good_after_eight = Batches([stream(sizes=(100,), items=100)], refusing(set(range(20, 28))), collate)
    assert len(good_after_eight.batch(0)[1]) == sum(range(1, 9))
    batches = Batches([stream(sizes=(100,), items=100)], refusing(set(range(20, 29))), collate)
    with pytest.raises(DataError, match=r"9 records in a row of source 0 .* record 20 \(key 'key-20'\).*key-28"):
        batches.batch(0)


def test_a_small_source_is_not_tried_twice():
    with pytest.raises(DataError, match="3 records in a row"):
        Batches([stream(sizes=(3,))], refusing({0, 1, 2}), collate).batch(0)


def faulty(n, reason="decode"):
    return [
        Fault(kind="text", source=0, record=i, key=str(i), reason=reason, message=f"{reason} of {i}", step=0)
        for i in range(n)
    ]


def test_faults_below_the_limit_are_counted_only():
    window = FaultWindow()
    window.add(10, faulty(90))  # 90 of 100, but of the last 10,000 as far as is known
    window.add(10, faulty(10, "size"))
    assert window.counts == {"decode": 90, "size": 10}


def test_faults_above_the_limit_stop_the_run_with_their_reasons():
    window = FaultWindow()
    window.add(10, faulty(90))
    with pytest.raises(DataError, match=r"101 of the last 10000 .*decode 90, size 11.*= 0.01 .*size of 10\.") as error:
        window.add(10, faulty(11, "size"))
    assert error.value.exit_code == 65


def test_old_faults_leave_the_window_and_stay_counted():
    window = FaultWindow()
    window.add(910, faulty(90))
    window.add(9000, [])  # together exactly the window
    with pytest.raises(DataError, match="101 of"):
        window.add(0, faulty(11))
    window = FaultWindow()
    window.add(910, faulty(90))
    window.add(10_000, [])
    window.add(0, faulty(100))
    assert window.counts == {"decode": 190}


def test_a_batch_larger_than_the_window_is_judged_by_itself():
    window = FaultWindow(max_bad_fraction=0.5, window=10)
    window.add(50, faulty(50))
    with pytest.raises(DataError, match="51 of the last 101"):
        window.add(50, faulty(51))


# --- worker processes


@pytest.fixture
def no_children():
    """No worker outlives the test."""
    before = set(multiprocessing.active_children())
    yield
    deadline = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < deadline, "loader workers are still alive"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, no_children):
    batches = two_kinds(lambda *place: (_refuse_third(*place), load(*place))[1])
    state = torch.random.get_rng_state()
    alone = list(iterate(batches, range(5, 9), micros=2))
    helped = list(iterate(batches, range(5, 9), micros=2, workers=workers))
    assert len(helped) == len(alone) == 8
    for (batch, faults), (expected, expected_faults) in zip(helped, alone):
        assert_same(batch, expected)
        assert faults == expected_faults
    assert any(faults for _, faults in alone)
    assert torch.equal(torch.random.get_rng_state(), state)


def _refuse_third(kind, source, record, epoch):
    if record == 3:
        raise RecordError("key-3: too large", reason="size")


def test_workers_compute_with_one_thread(no_children):
    threads = Batches([stream()], lambda *_: torch.tensor(torch.get_num_threads()), collate)
    ((batch, _),) = iterate(threads, range(1), workers=1)
    assert batch["text"].tolist() == [1, 1, 1, 1]


def test_stopping_early_ends_the_workers(no_children):
    results = iterate(two_kinds(), range(100), workers=2)
    next(results)
    assert len(multiprocessing.active_children()) >= 2
    results.close()


def failing_at(record, action):
    """Twelve records in order of the first epoch; the action befalls whoever loads that one."""

    def attempt(kind, source, number, epoch):
        if number == record:
            action()
        return torch.tensor(number)

    return Batches([stream(sizes=(12,), items=2)], attempt, collate)


def in_flight(batches, record):
    """Step of a record in the first epoch."""
    return next(s for s in range(6) if record in [p.record for p in batches.places(s)["text"]])


def test_a_worker_that_dies_is_named_with_its_record(no_children):
    batches = failing_at(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    step = in_flight(batches, 7)
    results, got = iterate(batches, range(6), workers=2), []
    message = rf"worker {step % 2} \(pid \d+\) died of SIGKILL at step {step}, part 0, in text record 7 \(key 'key-7'\)"
    with pytest.raises(DataError, match=message + " of source 0"):
        for batch, _ in results:
            got.append(batch["text"].tolist())
    assert got == [batches_of(batches, s) for s in range(len(got))]


def batches_of(batches, step):
    return [place.record for place in batches.places(step)["text"]]


def test_a_worker_that_exits_is_named_with_its_status(no_children):
    with pytest.raises(DataError, match=r"died with exit status 3 at step \d, part 0, in text record 0"):
        list(iterate(failing_at(0, lambda: os._exit(3)), range(6), workers=1))


@pytest.mark.parametrize("action", [lambda: time.sleep(300), lambda: os.kill(os.getpid(), signal.SIGSTOP)])
def test_a_worker_that_hangs_is_named_and_ended(action, no_children):
    batches = failing_at(7, action)
    step = in_flight(batches, 7)
    message = rf"no batch for step {step}, part 0 after 3 s: loader worker {step % 2} .* hangs at .* text record 7 "
    with pytest.raises(DataError, match=message):
        list(iterate(batches, range(6), workers=2, timeout=3))


def test_a_worker_slower_than_a_poll_is_waited_for(no_children):
    batches = failing_at(7, lambda: time.sleep(2.5))
    got = [batch["text"].tolist() for batch, _ in iterate(batches, range(6), workers=1, timeout=60)]
    assert got == [batches_of(batches, step) for step in range(6)]


def test_a_death_does_not_disturb_the_main_process_until_it_waits(no_children):
    """A step or a save must not be torn apart by an exception from a signal handler."""
    before = signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())
    results = iterate(two_kinds(), range(1000), workers=1)
    next(results)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert sum(range(100_000)) == 4_999_950_000  # work goes on
    assert signal.getsignal(signal.SIGCHLD) == before
    with pytest.raises(DataError, match=rf"worker 0 \(pid {worker.pid}\) died of SIGKILL"):
        list(results)


@pytest.mark.parametrize("workers", [0, 1])
def test_our_errors_cross_from_a_worker_with_their_own_words(workers, no_children):
    batches = Batches([stream(sizes=(20,))], refusing(set(range(20))), collate)
    with pytest.raises(DataError, match="^text: 9 records in a row of source 0 cannot be loaded"):
        list(iterate(batches, range(1), workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_keeps_its_type_and_place(workers, no_children):
    def broken(samples):
        raise RuntimeError("collate is broken")

    batches = Batches([stream()], load, broken)
    with pytest.raises(RuntimeError, match="collate is broken"):
        list(iterate(batches, range(1), workers=workers))


def test_interrupts_are_left_to_the_main_process(no_children):
    """Ctrl-C reaches every process of the group: a worker must still serve the step in progress."""
    batches = failing_at(7, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert len(list(iterate(batches, range(6), workers=1))) == 6


def test_streams_travel_to_a_spawned_worker():
    batches = pickle.loads(pickle.dumps(two_kinds()))  # platforms that spawn send them so
    assert_same(batches.batch(3)[0], two_kinds().batch(3)[0])
