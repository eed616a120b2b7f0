"""The order of records is a pure function, and an epoch holds every record once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiway.data.order import GROUP, Order, fold, generator, permutation


def epoch_of(order, epoch):
    """All records of an epoch in order."""
    places = [order.index(position) for position in range(epoch * order.n, (epoch + 1) * order.n)]
    assert {e for e, _ in places} == {epoch}
    return [record for _, record in places]


@settings(max_examples=60)
@given(
    blocks=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    shards=st.booleans(),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 10**6),
)
def test_every_record_exactly_once_per_epoch(blocks, shards, seed, epoch):
    order = Order(sum(blocks), seed, blocks if shards else None)
    assert sorted(epoch_of(order, epoch)) == list(range(sum(blocks)))


@settings(max_examples=30)
@given(positions=st.lists(st.integers(0, 10_000), max_size=40))
def test_a_position_means_the_same_whatever_was_asked_before(positions):
    blocks = [7, 0, 50, 1, 42]
    used = Order(100, 3, blocks)
    assert [used.index(p) for p in positions] == [Order(100, 3, blocks).index(p) for p in positions]


def test_epochs_and_seeds_differ_and_repeat():
    first, second = epoch_of(Order(500, 0), 0), epoch_of(Order(500, 0), 1)
    assert first != second
    assert first != epoch_of(Order(500, 1), 0)
    assert first == epoch_of(Order(500, 0), 0)


def test_blocks_stay_near_each_other_in_groups_of_bounded_size():
    size = GROUP // 4
    order = Order(16 * size, 5, [size] * 16)
    blocks = np.array([order.index(position)[1] // size for position in range(0, 16 * size, 8)])
    groups = [set(chunk.tolist()) for chunk in np.array_split(blocks, 4)]
    assert [len(group) for group in groups] == [4, 4, 4, 4]  # four blocks at a time, and only those
    assert set.union(*groups) == set(range(16))
    assert sorted(groups[0]) != [0, 1, 2, 3]  # the blocks themselves are permuted
    inside = blocks[: len(blocks) // 4]
    assert (np.diff(inside) != 0).mean() > 0.6  # and mixed within their group: 3/4 expected


def test_a_block_larger_than_a_group_is_one_group():
    order = Order(2 * GROUP + 3, 1, [2 * GROUP, 3])
    records = np.array(epoch_of(order, 0))
    assert np.array_equal(np.sort(records), np.arange(2 * GROUP + 3))
    tail = np.flatnonzero(records >= 2 * GROUP)
    assert tail.max() - tail.min() == 2


@pytest.mark.parametrize(("n", "blocks"), [(0, None), (3, [1, 1]), (2, [3, -1]), (0, [])])
def test_an_order_of_nothing_or_of_wrong_blocks_is_refused(n, blocks):
    with pytest.raises(ValueError, match=f"cannot order {n} records"):
        Order(n, 0, blocks)


def test_the_stream_of_a_key_never_changes():
    """Pinned: an older run must find its order and its draws again."""
    assert fold(0) == 0x6CF5883A657A59E660B1034468A44012
    assert int(generator(17, "view", 2, 5).bit_generator.random_raw()) == 10892552645372398469
    assert permutation(8, 17, "records", 0, 0).tolist() == [1, 0, 7, 5, 6, 2, 4, 3]
    assert [Order(8, 17).index(p) for p in range(6, 10)] == [(0, 4), (0, 3), (1, 3), (1, 2)]


def test_keys_are_told_apart():
    keys = [(), (0,), (0, 0), (1,), (12,), (1, 2), (-1,), ("view",), ("view", 0), (2**70,), ("hide", 0)]
    assert len({fold(7, *key) for key in keys} | {fold(8, *key) for key in keys}) == 2 * len(keys)
    assert fold(np.int64(7), np.int32(3)) == fold(7, 3)


def test_streams_of_neighbouring_keys_are_independent():
    draws = np.stack([generator(0, "view", epoch, 0).random(64) for epoch in range(400)])
    assert abs(draws.mean() - 0.5) < 0.01  # standard error 0.0018
    correlation = np.corrcoef(draws)[np.triu_indices(400, 1)]
    assert abs(correlation.mean()) < 0.003  # standard error 0.0004
    assert np.abs(correlation).max() < 0.75  # 80,000 of them with standard deviation 1/8


def test_permutations_are_uniform():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), permutation(5, seed)] += 1
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 45  # 16 degrees of freedom: exceeded once in 7,000
