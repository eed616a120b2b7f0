"""Captions are hidden as the released code hides them, and laid out so that nothing sees what comes after it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from multiway.data.captions import CaptionCollate, hide_caption
from multiway.data.collate import Words
from multiway.errors import ConfigError
from tests.contracts.toys import sample

WORDS = Words(bos=0, eos=2, mask_id=49, first=4, stop=49, longest=14, window=14)


@pytest.mark.parametrize(("length", "count"), [(2, 1), (3, 2), (5, 4), (6, 4), (10, 7), (12, 8), (32, 22)])
def test_so_many_tokens_are_hidden_and_never_the_first(length: int, count: int) -> None:
    """int(.7 n + .5), at most n - 1, at least 1; hidden places ascend."""
    ids = np.array([0, *range(4, 2 + length), 2])
    for seed in range(50):
        shown, hidden = hide_caption(ids, 0.7, WORDS, np.random.default_rng(seed))
        assert len(hidden) == count and hidden[0] > 0 and (np.diff(hidden) > 0).all()
        rest = np.setdiff1d(np.arange(length), hidden)
        assert (shown[rest] == ids[rest]).all()


def test_the_end_is_hidden_as_often_as_any_word_and_corruption_has_its_shares() -> None:
    ids, rng = np.array([0, *range(4, 12), 2]), np.random.default_rng(0)
    places, masked, kept, other = np.zeros(10), 0, 0, []
    for _ in range(4000):
        shown, hidden = hide_caption(ids, 0.7, WORDS, rng)
        places[hidden] += 1
        masked += (shown[hidden] == WORDS.mask_id).sum()
        kept += (shown[hidden] == ids[hidden]).sum()
        other += shown[hidden][(shown[hidden] != ids[hidden]) & (shown[hidden] != WORDS.mask_id)].tolist()
    total = places.sum()
    assert places[0] == 0
    assert places[1:] / 4000 == pytest.approx(7 / 9, abs=0.03)
    # 47 ids can be drawn at random, one of them <mask> and one what stood there
    assert masked / total == pytest.approx(0.8 + 0.1 / 47, abs=0.01)
    assert kept / total == pytest.approx(0.1 + 0.1 / 47, abs=0.01)
    assert min(other) == 3 and max(other) == 48


def test_a_batch_is_laid_out_causally() -> None:
    words = Words(bos=0, eos=2, mask_id=3, first=4, stop=40, longest=14, window=14)
    pairs = [sample(0, "pair", i) for i in range(3)]
    batch = CaptionCollate(words=words, grid=(4, 4), branches=6)({"pair": pairs})
    plan = batch["plan"]
    lengths = [len(pair.text) + 2 for pair in pairs]
    assert plan.part("image", "pair") == 3 * 17 and plan.part("text", "pair") == sum(lengths)
    keep = plan.groups[0].keep[:, 0]
    for own, n in zip(keep, lengths, strict=True):
        assert own[:17, :17].all() and not own[:17, 17:].any()
        assert (own[17 : 17 + n, 17 : 17 + n].numpy() == np.tri(n, dtype=bool)).all()
        assert own[17 : 17 + n, :17].all() and not own[:, 17 + n :].any()
    assert batch["drop_path"].shape == (6, 3) and batch["image"].shape == (3, 3, 32, 32)
    framed = np.concatenate([words.framed(pair.text, "pair") for pair in pairs])
    hidden = batch["text_hidden"].numpy()
    assert (batch["text_target"].numpy() == framed[hidden]).all()
    rest = np.setdiff1d(np.arange(len(framed)), hidden)
    assert (batch["text"].numpy()[rest] == framed[rest]).all()
    assert (batch["text_target"] == words.eos).any()


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no <mask>"):
        CaptionCollate(words=dataclasses.replace(WORDS, mask_id=-1), grid=(4, 4))


def test_the_same_generator_gives_the_same_batch() -> None:
    words = Words(bos=0, eos=2, mask_id=3, first=4, stop=40, longest=14, window=14)
    first, second = (CaptionCollate(words=words, grid=(4, 4))({"pair": [sample(0, "pair", 1)]}) for _ in range(2))
    assert (first["text"] == second["text"]).all() and (first["text_hidden"] == second["text_hidden"]).all()
