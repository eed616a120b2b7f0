"""Batches of pairs, apart and together: what is hidden, which of them match, whose other partners are drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from multiway.data.collate import DualCollate, MaskedCollate, MatchCollate
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


PATCHES = GRID[0] * GRID[1]
MASKED = MaskedCollate(words=WORDS, grid=GRID, contrast=True, leading=2, match=True)


def test_a_picture_read_with_a_text_has_more_in_front() -> None:
    batch = MASKED({kind: [sample(0, kind, i) for i in range(3)] for kind in ("image", "pair", "text")})
    assert [(s.kind, s.modality, s.samples) for s in batch["plan"].segments] == [
        ("image", "image", 6), ("pair", "image", 3), ("pair", "text", 3), ("text", "text", 6)
    ]  # fmt: skip
    assert [s.rows for s in batch["plan"].segments][:2] == [6 * (PATCHES + 1), 3 * (PATCHES + 2)]
    plain = dataclasses.replace(MASKED, leading=1, match=False)
    before = plain({kind: [sample(0, kind, i) for i in range(3)] for kind in ("image", "pair", "text")})
    assert batch.keys() - before.keys() == {"match"} and batch["match"].tolist() == [True] * 3
    assert all(torch.equal(before[key], batch[key]) for key in before.keys() - {"plan"})


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_batch_may_have_no_pairs(kind: str) -> None:
    batch = MASKED({kind: [sample(0, kind, i) for i in range(3)]})
    assert all(len(batch[key]) == 0 for key in ("match", "image_match", "text_match"))
    plain = MaskedCollate(words=WORDS, grid=GRID)({kind: [sample(0, kind, i) for i in range(3)]})
    assert all(torch.equal(plain[key], batch[key]) for key in plain.keys() - {"plan"})


def test_nothing_is_to_be_predicted_of_pairs_that_do_not_match() -> None:
    pairs = [dataclasses.replace(sample(0, "pair", i), match=i != 1) for i in range(3)]
    batch, whole = MASKED({"pair": pairs}), MASKED({"pair": [sample(0, "pair", i) for i in range(3)]})
    assert batch["match"].tolist() == [True, False, True]
    assert torch.equal(batch["image_hide"], whole["image_hide"]) and torch.equal(batch["text"], whole["text"])
    start, stop = (batch["plan"].starts["text"] - batch["plan"].extent("text")[0])[[1, 2]].tolist()
    inside = (whole["text_hidden"] >= start) & (whole["text_hidden"] < stop)
    assert inside.any() and torch.equal(batch["text_hidden"], whole["text_hidden"][~inside])
    assert torch.equal(batch["text_target"], whole["text_target"][~inside])
    pictures = whole["image_hidden"] // PATCHES
    assert torch.equal(batch["image_hidden"], whole["image_hidden"][pictures != 3 + 1])
    none = MASKED({"pair": pairs[1:2]})
    assert len(none["text_hidden"]) == len(none["image_hidden"]) == 0 and none["text_hidden"].dtype == torch.int64


def test_words_of_the_kinds_asked_for_are_hidden_whole() -> None:
    words = dataclasses.replace(WORDS, begins=np.arange(40) % 2 == 0)
    collate = MaskedCollate(
        words=words, grid=GRID, text_ratio=0.5, pair_ratio=0.5, whole_words=frozenset({"pair"})
    )  # fmt: skip
    split = {"pair": 0, "text": 0}
    for seed in range(20):
        for kind in split:
            records = [dataclasses.replace(sample(seed, kind, i), text=np.array([4, 5, 6, 7, 8, 9])) for i in range(4)]
            hidden = set(collate({kind: records})["text_hidden"].tolist())
            split[kind] += sum((8 * i + k in hidden) != (8 * i + k + 1 in hidden) for i in range(4) for k in (1, 3, 5))
    assert split["pair"] == 0 < split["text"]
    with pytest.raises(ConfigError, match="where words begin"):
        dataclasses.replace(collate, words=WORDS)
