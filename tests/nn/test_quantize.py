from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multiway.errors import NumericsError
from multiway.nn import quantize
from multiway.nn.quantize import Codebook, CodebookUpdate, PatchCodebook, nearest, spherical_means
from multiway.types import Across

CENTROIDS = np.random.default_rng(0).random((7, 12)).astype(np.float32)


def test_codes_name_the_nearest_centroid() -> None:
    book = PatchCodebook(7, 2).load_centroids(CENTROIDS)
    image = torch.randint(0, 256, (3, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = book(image)
    assert codes.shape == (3, 6) and codes.dtype == torch.int64
    for b in range(3):
        for i, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
            patch = image[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten().numpy() / 255
            assert codes[b, i] == np.square(CENTROIDS - patch).sum(1).argmin()
    assert len(codes.unique()) > 2


def test_a_tie_goes_to_the_lower_number() -> None:
    book = PatchCodebook(3, 2).load_centroids(np.stack([CENTROIDS[0], CENTROIDS[1], CENTROIDS[1]]))
    image = book.decode(torch.tensor([[2]]), (1, 1))
    assert book(image).tolist() == [[1]]


def test_decoding_draws_the_centroids() -> None:
    book = PatchCodebook(7, 2).load_centroids(CENTROIDS)
    codes = torch.arange(6).view(1, 6)
    image = book.decode(codes, (2, 3))
    assert image.dtype == torch.uint8 and image.shape == (1, 3, 4, 6)
    assert torch.equal(image[0, :, :2, 2:4].flatten(), torch.from_numpy(np.rint(CENTROIDS[1] * 255)).byte())
    assert torch.equal(book(image), codes)


def test_autocast_does_not_change_the_codes() -> None:
    book = PatchCodebook(7, 2).load_centroids(CENTROIDS)
    image = torch.randint(0, 256, (64, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = book(image)
    assert torch.equal(near, book(image))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def started(codes: int = 6, dim: int = 5) -> Codebook:
    """A codebook that was placed."""
    book = Codebook(codes, dim)
    book.weight.copy_(unit(codes, dim, seed=1))
    book.started.fill_(1)
    return book


def step(update: CodebookUpdate, book: Codebook, features: Tensor, number: int = 0) -> None:
    """One step of one process and one micro-batch."""
    update.collect(features, book(features), len(features), Across())
    update.apply(book, number)


def test_the_nearest_code_has_the_largest_cosine_and_a_tie_the_lower_number(monkeypatch) -> None:
    monkeypatch.setattr(quantize, "SCORES", 30)
    x, book = unit(4, 8, 5), started()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = book(x)
    want = (x[..., None, :] - book.weight).square().sum(-1).argmin(-1)
    assert codes.shape == (4, 8) and torch.equal(codes, want)
    assert nearest(unit(1, 5), unit(1, 5).repeat(3, 1)).tolist() == [0]


def test_k_means_finds_the_directions_of_clusters() -> None:
    centres = unit(5, 16)
    x = F.normalize(centres.repeat(40, 1) + 0.02 * unit(200, 16, seed=2), dim=-1)
    means = spherical_means(x, 12)
    assert torch.allclose(means.norm(dim=-1), torch.ones(12))
    assert ((x @ means.T).amax(1) > 0.999).all()
    assert torch.equal(means, spherical_means(x, 12))


def test_more_codes_than_features_repeat_them() -> None:
    x = unit(3, 4)
    means = spherical_means(x, 7)
    assert ((means @ x.T).amax(1) > 1 - 1e-6).all() and len(means.unique(dim=0)) == 3


def test_codes_move_to_the_mean_of_the_features_that_chose_them() -> None:
    """masked.md 4.2, code by code."""
    book, update = started(), CodebookUpdate(6, 5)
    book.weight[5] = -book.weight[:5].sum(0)  # nobody will choose it
    book.weight[5] = F.normalize(book.weight[5], dim=-1)
    x = F.normalize(book.weight[:5].repeat(4, 1) + 0.3 * unit(20, 5), dim=-1)
    before, codes = book.weight.clone(), book(x)
    step(update, book, x)
    for k in range(6):
        own = x[codes == k]
        mean = own.mean(0) / own.mean(0).norm() if len(own) else before[k]
        want = 0.99 * before[k] + 0.01 * mean
        torch.testing.assert_close(book.weight[k], want / want.norm(), rtol=0, atol=1e-6)
        assert book.cluster_size[k].item() == pytest.approx(0.01 * len(own))
    assert 0 < (codes.bincount(minlength=6) == 0).sum() < 6


def test_the_first_step_places_the_codes_by_k_means_in_whatever_order_features_come() -> None:
    books = [Codebook(4, 8), Codebook(4, 8)]
    x = F.normalize(unit(4, 8).repeat(4, 1) + 0.5 * unit(16, 8, seed=2), dim=-1)
    for book, features in zip(books, (x, x.flip(0)), strict=True):
        torch.manual_seed(5)
        book.init_weights()
        near = (x @ book.weight.T).amax(1).mean()
        update = CodebookUpdate(4, 8)
        step(update, book, features)
        assert book.started.item() == 1 and (x @ book.weight.T).amax(1).mean() > near + 0.05
        assert not update.chosen.any(), "what chose random codes says nothing about their use"
    torch.testing.assert_close(books[0].weight, books[1].weight, rtol=0, atol=1e-6)


def in_ranks(world: int, work: Callable[[Across], None]) -> None:
    """``work`` on ``world`` threads that exchange what processes would."""
    barrier, board = threading.Barrier(world, timeout=20), [torch.empty(0)] * world

    def exchange(rank: int, x: Tensor) -> list[Tensor]:
        board[rank] = x
        barrier.wait()
        found = list(board)
        barrier.wait()
        return found

    def run(rank: int) -> None:
        gather = lambda x: torch.cat(exchange(rank, x))  # noqa: E731
        total = lambda x: torch.stack(exchange(rank, x)).sum(0)  # noqa: E731
        work(Across(gather=gather, total=total, rank=rank, world=world))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("world", "micros"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_leave_the_codebook_of_one_process(world: int, micros: int, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "WINDOW", 2)
    few = unit(3, 5).repeat(22, 1)[:64]
    steps = [unit(64, 5, seed=0), *(F.normalize(few + 0.1 * unit(64, 5, seed=seed), dim=-1) for seed in (1, 2, 3, 4))]

    def train(across: Across, parts: int) -> tuple[Codebook, CodebookUpdate]:
        book, update = Codebook(24, 5), CodebookUpdate(24, 5)
        book.weight.copy_(unit(24, 5, seed=9))
        for number, x in enumerate(steps):
            codes = book(x)
            for part in range(across.rank, parts, across.world):
                update.collect(x[part::parts], codes[part::parts], len(x), across)
            update.apply(book, number)
        return book, update

    want, whole = train(Across(), 1)
    found: list[tuple[Codebook, CodebookUpdate]] = []
    in_ranks(world, lambda across: found.append(train(across, world * micros)))
    assert len(found) == world
    for book, update in found:
        torch.testing.assert_close(book.weight, want.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(book.cluster_size, want.cluster_size)
        assert torch.equal(update.chosen, whole.chosen)
    assert (whole.chosen[0] == 0).any(), "no code was dead, so none was revived"


def test_a_step_that_was_skipped_leaves_no_trace() -> None:
    book, update = started(), CodebookUpdate(6, 5)
    other, fresh = started(), CodebookUpdate(6, 5)
    bad = unit(10, 5).fill_(float("nan"))
    update.collect(bad, book(bad), 10, Across())
    for b, u in ((book, update), (other, fresh)):
        step(u, b, unit(12, 5))
    assert torch.equal(book.weight, other.weight) and torch.equal(update.chosen, fresh.chosen)
    assert book.weight.isfinite().all()


def test_dead_codes_are_placed_at_features_when_a_window_ends(monkeypatch) -> None:
    monkeypatch.setattr(quantize, "WINDOW", 3)
    book, update = started(), CodebookUpdate(6, 5)
    x = F.normalize(book.weight[:2].repeat(8, 1) + 0.1 * unit(16, 5, seed=3), dim=-1)
    dead = book.weight[2:].clone()
    for number in range(3):
        assert torch.equal(book.weight[2:], dead)
        step(update, book, x, number)
    assert ((book.weight[2:] @ x.T).amax(1) > 1 - 1e-6).all() and len(book.weight.unique(dim=0)) == 6
    again, other = started(), CodebookUpdate(6, 5)
    for number in range(3):
        step(other, again, x, number)
    assert torch.equal(again.weight, book.weight)
    assert update.chosen[0].tolist() == pytest.approx([3 * int(n) for n in started()(x).bincount(minlength=6)])
    step(update, book, x, 3)
    assert len(book(x).unique()) > 2


def test_usage_is_the_share_of_codes_chosen_and_the_perplexity_of_the_choice() -> None:
    book, update = started(), CodebookUpdate(6, 5)
    assert [value.item() for value in update.usage()] == [0, 1]
    step(update, book, book.weight[[0, 0, 3, 4]])
    usage, perplexity = update.usage()
    assert usage.item() == pytest.approx(3 / 6)
    assert perplexity.item() == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))


def test_a_codebook_that_stays_collapsed_ends_the_run(monkeypatch) -> None:
    monkeypatch.setattr(quantize, "WINDOW", 2)
    book, update = started(40, 5), CodebookUpdate(40, 5)
    same = unit(1, 5).repeat(32, 1)  # revived codes fall together, too
    for number in range(5):
        step(update, book, same, number)
    with pytest.raises(NumericsError, match=r"up to step 6, less than 5% of its 40 codes.*in the last 2.50%.*Take"):
        step(update, book, same, 5)


def test_one_good_window_forgives(monkeypatch) -> None:
    monkeypatch.setattr(quantize, "WINDOW", 1)
    book, update = started(40, 5), CodebookUpdate(40, 5)
    for number in range(8):
        step(update, book, unit(32, 5) if number % 3 == 2 else unit(1, 5).repeat(32, 1), number)
    assert update.low.item() == 2
