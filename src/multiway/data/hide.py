"""What is hidden from the model: patches in blocks (BEiT), cells (SimMIM), one by one (MAE) or in a square; words.

``hide`` is True where the model must predict. All draws come from the generator of the sample. Grids are (rows,
columns) of patches; a grid of pixels is one of patches of 1.
"""

from __future__ import annotations

import math

import numpy as np

ASPECT = (0.3, 1 / 0.3)
"""Range of height / width of a block (BEiT)."""

TRIES = 10
"""Draws before a block is given up (BEiT)."""

MIN_BLOCK_OF_196 = 16
"""Patches of the smallest block on BEiT's 14x14 grid; other grids scale it."""

REPLACE, RANDOM = 0.8, 0.1
"""Of the hidden text tokens: share shown as ``<mask>`` and share shown as a random word; the rest stays (BERT)."""


def smallest_block(patches: int) -> int:
    """Patches of the smallest block on a grid of ``patches``: 16 of 196, scaled, at least 1."""
    return max(1, round(MIN_BLOCK_OF_196 * patches / 196))


def hide_blocks(grid: tuple[int, int], count: int, min_block: int, rng: np.random.Generator) -> np.ndarray:
    """Hide exactly ``count`` patches of a (rows, columns) grid, in blocks of at least ``min_block``: bool (P,).

    Blocks are drawn as in BEiT until no further one fits; what is then missing to ``count`` is taken at random, as in
    BEiT-2, so that every picture hides the same number. Source: specs of BEiT's and BEiT-2's masking_generator.py.
    """
    height, width = grid
    if not 0 <= count <= height * width:
        raise ValueError(f"cannot hide {count} of {height * width} patches")
    hide = np.zeros(grid, dtype=bool)
    hidden = 0
    while hidden < count:
        added = _add_block(hide, count - hidden, min_block, rng)
        if added == 0:
            break
        hidden += added
    flat = hide.reshape(-1)
    if hidden < count:
        flat[rng.choice(np.flatnonzero(~flat), count - hidden, replace=False)] = True
    return flat


def _add_block(hide: np.ndarray, room: int, min_block: int, rng: np.random.Generator) -> int:
    """Try to hide one more block of at most ``room`` new patches in place; the number added, 0 if none fitted."""
    height, width = hide.shape
    for _ in range(TRIES):
        area = min_block + (room - min_block) * rng.random()
        aspect = math.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * rng.random())
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        block = hide[top : top + h, left : left + w]
        added = h * w - int(block.sum())
        if 0 < added <= room:
            block[:] = True
            return added
    return 0


def hide_cells(grid: tuple[int, int], cell: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hide cells of ``cell`` x ``cell`` patches, ``ceil(cells * ratio)`` of them: bool (P,).

    On a grid that is not whole cells the last cells are cut, so that pictures may differ in hidden patches.
    Source: vision.md 7.2, SimMIM's mask generator.
    """
    rows, columns = (math.ceil(side / cell) for side in grid)
    hide = (rng.permutation(rows * columns) < math.ceil(rows * columns * ratio)).reshape(rows, columns)
    return hide.repeat(cell, axis=0).repeat(cell, axis=1)[: grid[0], : grid[1]].reshape(-1)


def hide_patches(grid: tuple[int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hide patches one by one, all but ``int(P * (1 - ratio))``: bool (P,). Source: vision.md 4.1, MAE."""
    patches = math.prod(grid)
    return rng.permutation(patches) >= int(patches * (1 - ratio))


def hide_square(grid: tuple[int, int], ratio: float, central: bool, rng: np.random.Generator) -> np.ndarray:
    """Hide one square of about ``ratio`` of the patches, in the centre or anywhere: bool (P,)."""
    side = min(*grid, round(math.sqrt(math.prod(grid) * ratio)))
    top, left = ((length - side) // 2 if central else int(rng.integers(length - side + 1)) for length in grid)
    hide = np.zeros(grid, dtype=bool)
    hide[top : top + side, left : left + side] = True
    return hide.reshape(-1)


def hide_words(
    ids: np.ndarray,
    ratio: float,
    ordinary: tuple[int, int],
    mask_id: int,
    rng: np.random.Generator,
    begins: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide exactly ``max(1, round(ratio * n))`` of the n ordinary tokens of a text, or with ``begins`` whole words.

    ids: int (N,); ordinary: ids in [first, stop) are words, all others are special and never hidden; begins: bool
    (vocab,), True = the id begins a word, which goes on to the next that does. Words are taken in random order as long
    as they fit into that number of tokens (BERT); where every word is longer than it, one word is hidden. Returns the
    corrupted ids (80 % of the hidden ones ``mask_id``, 10 % a random word, 10 % unchanged) and the hidden places,
    ascending; a text without words hides nothing.
    """
    words = np.flatnonzero((ids >= ordinary[0]) & (ids < ordinary[1]))
    if len(words) == 0:
        return ids, words
    count = max(1, round(ratio * len(words)))
    if begins is None:
        hidden = np.sort(rng.choice(words, count, replace=False))
    else:
        hidden = _whole_words(words, begins[ids[words]], count, rng)
    fate = rng.random(len(hidden))
    shown = ids.copy()
    shown[hidden[fate < REPLACE]] = mask_id
    random = hidden[(fate >= REPLACE) & (fate < REPLACE + RANDOM)]
    shown[random] = rng.integers(*ordinary, size=len(random))
    return shown, hidden


def _whole_words(places: np.ndarray, begins: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of random whole words, at most ``count`` of them or one word, ascending; ``begins``: of every place."""
    apart = np.diff(places) > 1  # what follows a special token begins a word, too
    words = np.split(places, np.flatnonzero(begins[1:] | apart) + 1)
    order = rng.permutation(len(words))
    chosen: list[np.ndarray] = []
    for word in (words[i] for i in order):
        if len(word) <= count:
            chosen.append(word)
            count -= len(word)
    return np.sort(np.concatenate(chosen or [words[order[0]]]))
