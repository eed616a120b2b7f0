"""What is hidden: exact numbers, blocks as BEiT draws them, cells, squares, words as BERT corrupts them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiway.data.hide import hide_blocks, hide_cells, hide_patches, hide_square, hide_words, smallest_block
from multiway.data.order import generator

FIRST, STOP, MASK = 4, 1000, 3


class Watched:
    """A generator that counts the patches filled in one by one after the blocks."""

    def __init__(self, seed):
        self.rng, self.filled = generator(0, "watched", seed), 0
        self.random, self.integers = self.rng.random, self.rng.integers

    def choice(self, places, count, replace):
        self.filled = count
        return self.rng.choice(places, count, replace=replace)


@given(height=st.integers(1, 16), width=st.integers(1, 16), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_exactly_as_many_patches_as_asked_are_hidden(height, width, share, seed):
    count = round(share * height * width)
    hide = hide_blocks((height, width), count, smallest_block(height * width), generator(seed))
    assert hide.shape == (height * width,)
    assert hide.dtype == bool
    assert hide.sum() == count


@pytest.mark.parametrize(("side", "count", "mean", "low"), [(14, 75, 74.48, 64), (16, 102, 101.5, 91)])
def test_blocks_cover_what_beit_s_do(side, count, mean, low):
    """Before the rest is filled in: mean, minimum and share of complete masks measured of the original procedure."""
    covered = []
    for seed in range(1500):
        rng = Watched(seed)
        hide_blocks((side, side), count, 16, rng)
        covered.append(count - rng.filled)
    assert np.mean(covered) == pytest.approx(mean, abs=0.12)
    assert low - 3 <= min(covered) <= low + 6
    if side == 14:
        assert np.mean(np.equal(covered, count)) == pytest.approx(0.675, abs=0.05)


def test_no_block_spans_the_grid():
    """BEiT's blocks are smaller than the grid both ways, so on a single row all patches are drawn one by one."""
    rng = Watched(0)
    hide_blocks((1, 12), 5, 1, rng)
    assert rng.filled == 5


def neighbours(hide):
    """Share of hidden among the neighbours (right and below) of hidden patches."""
    right, below = hide[:, :-1], hide[:-1]
    both = (right & hide[:, 1:]).sum() + (below & hide[1:]).sum()
    return both / (right.sum() + below.sum())


@pytest.mark.parametrize(("side", "ratio"), [(14, 0.4), (4, 0.4), (8, 0.4)])
def test_hidden_patches_lie_together(side, ratio):
    count = round(ratio * side * side)
    together = [
        neighbours(hide_blocks((side, side), count, smallest_block(side**2), generator(seed)).reshape(side, side))
        for seed in range(400)
    ]
    scattered = (count - 1) / (side * side - 1)  # of patches drawn one by one
    assert np.mean(together) > scattered + 0.1


def test_blocks_favour_no_side():
    """A block lies anywhere inside the grid: the middle is hidden more often than a corner, and all sides equally."""
    often = np.mean([hide_blocks((14, 14), 78, 16, generator(seed)) for seed in range(600)], axis=0).reshape(14, 14)
    assert often.min() > 0  # no patch is always seen
    assert often[5:9, 5:9].mean() > 0.4 > 0.2 > often[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    for one, other in ((often[:7], often[7:]), (often[:, :7], often[:, 7:])):
        assert one.mean() == pytest.approx(other.mean(), abs=0.04)
    assert np.abs(often - often.T).max() < 0.15  # standard error of a difference 0.028


def test_the_smallest_block_scales_with_the_grid():
    assert [smallest_block(n) for n in (196, 256, 64, 16, 4, 1)] == [16, 21, 5, 1, 1, 1]


def test_blocks_follow_their_generator():
    one, same, other = (hide_blocks((14, 14), 78, 16, generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("grid", "cell", "ratio", "cells"),
    [((48, 48), 8, 0.6, 22), ((14, 14), 2, 0.6, 30), ((12, 12), 3, 0.6, 10), ((6, 9), 3, 0.5, 3), ((8, 8), 1, 0.1, 7)],
)
def test_cells_are_hidden_whole(grid, cell, ratio, cells):
    """The first two are SimMIM's defaults for Swin at 192 px and ViT at 224."""
    hide = hide_cells(grid, cell, ratio, generator(0))
    assert hide.dtype == bool and hide.sum() == cells * cell**2
    whole = hide.reshape(grid[0] // cell, cell, grid[1] // cell, cell).sum((1, 3))
    assert set(whole.flat) <= {0, cell**2}


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    cell=st.integers(1, 8),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_cells_at_the_border_are_cut(height, width, cell, ratio, seed):
    hide = hide_cells((height, width), cell, ratio, generator(seed)).reshape(height, width)
    hidden = 0
    for top in range(0, height, cell):
        for left in range(0, width, cell):
            part = hide[top : top + cell, left : left + cell]
            assert part.all() or not part.any()
            hidden += bool(part.any())
    assert hidden == np.ceil(-(-height // cell) * -(-width // cell) * ratio)


@pytest.mark.parametrize(("side", "ratio", "keep"), [(14, 0.75, 49), (16, 0.75, 64), (7, 0.6, 19), (4, 0.0, 16)])
def test_mae_keeps_the_whole_number_below(side, ratio, keep):
    assert (~hide_patches((side, side), ratio, generator(0))).sum() == keep


@pytest.mark.parametrize(
    "draw", [lambda rng: hide_patches((4, 6), 0.75, rng), lambda rng: hide_cells((4, 6), 1, 0.75, rng)]
)
def test_every_patch_is_hidden_as_often(draw):
    often = np.mean([draw(generator(seed)) for seed in range(2000)], axis=0)
    assert np.abs(often - 0.75).max() < 0.04  # 4 deviations
    assert np.array_equal(draw(generator(3)), draw(generator(3)))
    assert not np.array_equal(draw(generator(3)), draw(generator(4)))


def test_a_square_lies_in_the_centre_or_anywhere():
    central = hide_square((12, 12), 0.4, True, generator(0)).reshape(12, 12)  # side round(sqrt(57.6)) = 8
    assert central.sum() == 64 and central[2:10, 2:10].all()
    places = set()
    for seed in range(400):
        square = hide_square((12, 10), 0.4, False, generator(seed)).reshape(12, 10)
        rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
        assert square.sum() == len(rows) * len(columns) == 49  # side round(sqrt(48)) = 7
        assert np.ptp(rows) == np.ptp(columns) == 6
        places.add((rows[0], columns[0]))
    assert len(places) == 6 * 4
    assert hide_square((3, 20), 0.9, False, generator(0)).sum() == 9  # no longer than the shorter side


@pytest.mark.parametrize("count", [-1, 17])
def test_more_patches_than_there_are_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot hide {count} of 16"):
        hide_blocks((4, 4), count, 1, generator(0))


@given(
    words=st.lists(st.integers(0, STOP - 1), min_size=1, max_size=60),
    ratio=st.sampled_from([0.15, 0.4, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_exactly_the_share_of_words_is_hidden_and_never_a_special(words, ratio, seed):
    ids = np.array(words)
    before = ids.copy()
    shown, hidden = hide_words(ids, ratio, (FIRST, STOP), MASK, generator(seed))
    assert np.array_equal(ids, before)  # the targets are read from them
    ordinary = int((ids >= FIRST).sum())
    assert len(hidden) == (max(1, round(ratio * ordinary)) if ordinary else 0)
    assert (np.diff(hidden) > 0).all()
    assert (ids[hidden] >= FIRST).all()
    assert set(np.flatnonzero(shown != ids)) <= set(hidden.tolist())
    assert all(word == MASK or FIRST <= word < STOP for word in shown[hidden])


def test_hidden_words_are_masked_replaced_or_kept_as_in_bert():
    ids = np.arange(FIRST, STOP)
    shown, hidden = hide_words(ids, 1.0, (FIRST, STOP), MASK, generator(0))
    masked, kept = (shown == MASK).mean(), (shown == ids).mean()
    assert len(hidden) == len(ids)
    assert masked == pytest.approx(0.8, abs=0.04)  # standard error 0.013
    assert kept == pytest.approx(0.1, abs=0.03)
    assert 1 - masked - kept == pytest.approx(0.1, abs=0.03)


def test_every_word_is_hidden_equally_often():
    ids = np.array([0, *range(FIRST, FIRST + 10), 2])
    often = np.zeros(12)
    for seed in range(2000):
        often[hide_words(ids, 0.5, (FIRST, STOP), MASK, generator(seed))[1]] += 1
    assert often[0] == often[-1] == 0
    assert often[1:-1] / 2000 == pytest.approx(np.full(10, 0.5), abs=0.05)  # standard error 0.011


def test_a_text_without_words_hides_nothing():
    shown, hidden = hide_words(np.array([0, 2]), 0.5, (FIRST, STOP), MASK, generator(0))
    assert shown.tolist() == [0, 2]
    assert hidden.tolist() == []


BEGINS = np.arange(STOP) % 3 == 1
"""Every third id begins a word, two go on with it."""
text = st.lists(st.integers(0, STOP - 1), max_size=30)


def words_of(ids):
    """Places of each word, in order: it begins where an id does, or behind what is no word."""
    words = []
    for i, word in enumerate(ids):
        if word < FIRST:
            continue
        if BEGINS[word] or i == 0 or ids[i - 1] < FIRST:
            words.append([])
        words[-1].append(i)
    return words


@given(ids=text, ratio=st.floats(0, 1), seed=st.integers(0, 99))
def test_words_are_hidden_whole(ids, ratio, seed):
    words = words_of(ids)
    shown, hidden = hide_words(np.array(ids, dtype=int), ratio, (FIRST, STOP), MASK, generator(seed), BEGINS)
    assert (np.diff(hidden) > 0).all() and set(np.flatnonzero(shown != ids)) <= set(hidden.tolist())
    chosen = [word for word in words if word[0] in hidden]
    assert sorted(i for word in chosen for i in word) == hidden.tolist()
    count = max(1, round(ratio * sum(map(len, words))))
    assert len(hidden) <= count or len(chosen) == 1
    assert len(chosen) >= min(1, len(words))
    left = count - len(hidden)
    assert all(len(word) > left for word in words if word not in chosen)  # nothing else would have fitted


def test_whole_words_take_turns():
    ids = np.array([0, *[4, 5, 6] * 2, 4, 2])  # words of 3, 3 and 1 pieces
    often = np.zeros(len(ids))
    for seed in range(2000):
        hidden = hide_words(ids, 3 / 7, (FIRST, STOP), MASK, generator(seed), np.arange(STOP) == 4)[1]
        often[hidden] += 1
    assert often[0] == often[-1] == 0
    assert (often[1:4] == often[1]).all() and (often[4:7] == often[4]).all()
    # the single piece first (1/3) leaves two places, into which neither of the others fits; else one of those
    assert often[[1, 4, 7]] / 2000 == pytest.approx(np.full(3, 1 / 3), abs=0.05)
