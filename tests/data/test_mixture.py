"""Mixtures: exact shares, every source without gap, one pass per epoch without weights."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiway.data.mixture import CHUNK, SLOTS, Mixture, Place, mix, shares
from multiway.errors import ConfigError

positive_weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


def mixture(weights, sizes=None, seed=0):
    sizes = sizes or [10] * len(weights)
    return Mixture(sizes, weights, seed, [None] * len(sizes))


@given(weights=positive_weights, zeros=st.integers(0, 3))
def test_shares_are_exact_within_one_slot_and_none_is_lost(weights, zeros):
    given_slots = shares([*weights, *[0.0] * zeros])
    assert sum(given_slots) == SLOTS
    assert given_slots[len(weights) :] == [0] * zeros
    assert min(given_slots[: len(weights)]) >= 1
    quotas = SLOTS * np.array(weights) / np.sum(weights)
    if (quotas >= 1).all():
        assert np.abs(np.array(given_slots[: len(weights)]) - quotas).max() < 1


def test_shares_by_largest_remainder():
    assert shares([0.7, 0.2, 0.1]) == [700, 200, 100]
    assert shares([3, 1, 1], slots=6) == [4, 1, 1]  # quotas 3.6, 1.2, 1.2
    assert shares([1, 1, 1], slots=10) == [4, 3, 3]  # a tie goes to the first
    assert shares([1e9, 1, 1], slots=4) == [2, 1, 1]
    assert shares([1, 1] + [1e-9] * 3, slots=5) == [1, 1, 1, 1, 1]


@settings(max_examples=25)
@given(weights=positive_weights, seed=st.integers(0, 99), block=st.integers(0, 10**6))
def test_each_source_gets_its_slots_and_is_consumed_without_gap(weights, seed, block):
    mixed = mixture(weights, seed=seed)
    turns = [mixed.turn(position) for position in range(block * SLOTS, (block + 2) * SLOTS)]
    for source, slots in enumerate(mixed.slots):
        assert [place for owner, place in turns if owner == source] == list(range(block * slots, (block + 2) * slots))


def test_the_order_of_slots_changes_from_block_to_block_and_with_the_seed():
    def owners(seed, block):
        mixed = mixture([2, 1], seed=seed)
        return [mixed.turn(position)[0] for position in range(block * SLOTS, (block + 1) * SLOTS)]

    assert owners(0, 0) == owners(0, 0)
    assert owners(0, 0) != owners(0, 1)
    assert owners(0, 0) != owners(1, 0)
    switches = np.count_nonzero(np.diff(owners(0, 0)))
    assert 380 < switches < 510  # 2 * 2/3 * 1/3 * 999 = 444 expected of well-mixed slots


def test_sources_of_a_mixture_run_through_their_own_epochs():
    mixed = mixture([3, 1], sizes=[50, 7])
    seen = Counter(mixed.index(position) for position in range(4 * SLOTS))
    assert set(seen.values()) == {1}
    big = [place for place in seen if place.source == 0]
    assert sorted(big) == [Place(0, epoch, record) for epoch in range(60) for record in range(50)]
    small = Counter(place.epoch for place in seen if place.source == 1)
    assert small == {**dict.fromkeys(range(142), 7), 142: 6}  # 1000 = 142 * 7 + 6


def test_equal_sources_are_ordered_differently():
    mixed = mixture([1, 1], sizes=[40, 40])
    places = [mixed.index(position) for position in range(SLOTS)]
    first, second = ([p.record for p in places if p.source == i][:40] for i in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


@settings(max_examples=40)
@given(
    sources=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=5),
    sharded=st.lists(st.booleans(), min_size=5, max_size=5),
    epoch=st.integers(0, 1000),
)
def test_without_weights_an_epoch_sees_every_record_of_every_source_once(sources, sharded, epoch):
    sizes = [sum(blocks) for blocks in sources]
    joined = mix(sizes, None, 0, [blocks if shard else None for blocks, shard in zip(sources, sharded)])
    total = sum(sizes)
    places = [joined.index(position) for position in range(epoch * total, (epoch + 1) * total)]
    everything = [Place(source, epoch, record) for source, n in enumerate(sizes) for record in range(n)]
    assert sorted(places) == everything


def test_a_source_without_shards_is_spread_among_those_with_shards():
    sizes = [40 * CHUNK, 20 * CHUNK]
    joined = mix(sizes, None, 1, [[2 * CHUNK] * 20, None])
    owners = np.array([joined.index(position).source for position in range(0, sum(sizes), 64)])
    share = [part.mean() for part in np.array_split(owners, 3)]
    assert min(share) > 0.1  # a third of all records, in no part of the epoch absent


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ConfigError, match="expected finite numbers >= 0, at least one above 0"):
        mixture(weights)


def test_too_many_sources_or_too_few_weights_are_refused():
    with pytest.raises(ConfigError, match="1001 sources with a weight: a mixture holds at most 1000"):
        shares([1.0] * (SLOTS + 1))
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        mixture([1.0], sizes=[3, 3])
