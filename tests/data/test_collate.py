"""Batches of pairs apart, whose words are hidden and whose other partners are drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from multiway.data.collate import DualCollate, MatchCollate
from multiway.errors import ConfigError
from tests.contracts.toys import GRID, WORDS, sample

MATCH = MatchCollate(words=WORDS, grid=GRID, branches=4, ratio=0.4)


def test_pairs_are_laid_out_as_for_contrast_with_words_hidden() -> None:
    samples = [sample(0, "pair", i) for i in range(6)]
    batch = MATCH({"pair": samples})
    plain = DualCollate(words=WORDS, grid=GRID, branches=4)({"pair": [sample(0, "pair", i) for i in range(6)]})
    assert batch["plan"].segments == plain["plan"].segments
    assert torch.equal(batch["image"], plain["image"]) and torch.equal(batch["drop_path"], plain["drop_path"])
    whole = batch["text"].index_copy(0, batch["text_hidden"], batch["text_target"])
    assert torch.equal(whole, plain["text"])
    starts = [*batch["plan"].starts["text"].tolist(), batch["plan"].rows]
    first = batch["plan"].extent("text")[0]
    for own, begin, end in zip(samples, starts, starts[1:], strict=False):
        hidden = ((batch["text_hidden"] >= begin - first) & (batch["text_hidden"] < end - first)).sum().item()
        assert own.text is not None
        assert hidden == (max(1, round(0.4 * len(own.text))) if len(own.text) else 0)
    draws = batch["match_draw"]
    assert draws.shape == (6, 2) and draws.dtype == torch.float32
    assert ((draws >= 0) & (draws < 1)).all() and len(draws.unique()) == 12


def test_what_is_drawn_for_a_pair_does_not_depend_on_the_others() -> None:
    alone = MATCH({"pair": [sample(0, "pair", 3)]})
    together = MATCH({"pair": [sample(0, "pair", i) for i in range(5)]})
    assert torch.equal(alone["match_draw"][0], together["match_draw"][3])
    assert torch.equal(alone["drop_path"][:, 0], together["drop_path"][:, 3])


def test_whole_words_are_hidden_where_pieces_tell_them() -> None:
    begins = np.arange(40) % 2 == 0  # an odd piece goes on
    words = dataclasses.replace(WORDS, begins=begins)
    collate = dataclasses.replace(MATCH, words=words, whole_words=True, ratio=0.5)
    split = 0
    for seed in range(20):
        pairs = [dataclasses.replace(sample(seed, "pair", i), text=np.array([4, 5, 6, 7, 8, 9])) for i in range(4)]
        hidden = set(collate({"pair": pairs})["text_hidden"].tolist())
        split += sum((8 * i + k in hidden) != (8 * i + k + 1 in hidden) for i in range(4) for k in (1, 3, 5))
    assert split == 0
    with pytest.raises(ConfigError, match="where words begin"):
        dataclasses.replace(MATCH, whole_words=True)
    with pytest.raises(ConfigError, match="no <mask>"):
        dataclasses.replace(MATCH, words=dataclasses.replace(WORDS, mask_id=-1))
