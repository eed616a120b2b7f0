"""Others are drawn by their probability, from a number that the batch brings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multiway.objectives.matching import draw_others


def test_a_draw_is_a_quantile_of_the_others() -> None:
    """Shares of the others of the first are .1, .2, .7 in this order; its partner stands between them."""
    scores = torch.tensor([[0.1, 5.0, 0.2, 0.7]]).log().expand(6, -1)
    own = torch.ones(6, dtype=torch.int64)
    draws = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 2**-24])
    assert draw_others(scores, own, draws).tolist() == [0, 0, 2, 2, 3, 3]


def test_others_are_drawn_as_often_as_they_are_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 5, generator=generator)
    count = 20_000
    draws = (torch.arange(count) + 0.5) / count
    found = draw_others(scores.expand(count, -1), torch.full((count,), 3), draws)
    weights = scores[0].exp().clone()
    weights[3] = 0
    shares = np.bincount(found.numpy(), minlength=5) / count
    np.testing.assert_allclose(shares, (weights / weights.sum()).numpy(), atol=1e-3)


def test_a_partner_is_never_drawn_however_sure_the_scores_are() -> None:
    scores = torch.full((3, 3), -200.0).fill_diagonal_(200.0)
    for draw in (0.0, 0.5, 1 - 2**-24):
        found = draw_others(scores, torch.arange(3), torch.full((3,), draw))
        assert (found != torch.arange(3)).all() and (found < 3).all()


def test_one_pair_has_no_others() -> None:
    with pytest.raises(ValueError, match="two or more"):
        draw_others(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
