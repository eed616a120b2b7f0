"""Exact search against brute force, ties, and queries of both kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multiway.errors import ConfigError, MissingInputError
from multiway.search.embed import embed
from multiway.search.query import nearest, search
from multiway.search.store import Store
from tests.tiny import CAPTIONS, pictures, pretrained, write_pictures


def dyadic(rng, n):
    """Unit vectors whose inner products are exact in float32, with many equal ones."""
    return torch.from_numpy(rng.choice([-0.125, 0.125], (n, 64)).astype(np.float32))


def brute_force(vectors, queries, k):
    scores = queries.double().numpy() @ vectors.double().numpy().T
    rows = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in scores])
    return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("cuts", [[300], [1, 2, 100, 0, 197], [100, 100, 100]])
def test_equals_brute_force_ties_by_row_whatever_the_parts(k, cuts):
    rng = np.random.default_rng(0)
    vectors, queries = dyadic(rng, 300), dyadic(rng, 20)
    vectors[150:200] = vectors[:50]  # equal ones far apart
    scores, rows = nearest(vectors.split(cuts), queries, k)
    expected_scores, expected_rows = brute_force(vectors, queries, k)
    assert np.array_equal(rows.numpy(), expected_rows)
    assert np.array_equal(scores.numpy(), expected_scores)
    assert len(np.unique(expected_scores)) < 50


def test_signs_and_zeros_are_ordered():
    vectors = torch.tensor([[-1.0], [0.5], [-0.0], [0.0], [-0.25], [1.0], [-1e-30], [1e-30]])
    scores, rows = nearest([vectors], torch.ones(1, 1), 8)
    assert rows[0].tolist() == [5, 1, 7, 2, 3, 6, 4, 0]
    assert scores[0].tolist() == [1.0, 0.5, pytest.approx(1e-30), 0.0, 0.0, pytest.approx(-1e-30), -0.25, -1.0]


def test_random_vectors_give_the_brute_force_scores():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(2000, 48, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(50, 48, generator=generator), dim=1)
    scores, rows = nearest(vectors.split(333), queries, 10)
    assert np.allclose(scores.numpy(), brute_force(vectors, queries, 10)[0], atol=1e-6)
    assert torch.allclose((vectors[rows] * queries[:, None]).sum(2), scores, atol=1e-6)
    assert all(len(set(row)) == 10 for row in rows.tolist())


def test_more_results_than_rows_and_fewer_than_one():
    vectors = torch.eye(3)
    assert nearest([vectors], vectors, 10)[1].shape == (3, 3)
    assert nearest([], vectors, 10)[1].shape == (3, 0)
    with pytest.raises(ConfigError, match="expected 1 or more"):
        nearest([vectors], vectors, 0)
    with pytest.raises(ConfigError, match="width 3 in a store of width 4"):
        nearest([torch.eye(4)], vectors, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder, a folder of pictures with captions, and the store of it."""
    root = tmp_path_factory.mktemp("search")
    pretrained().save_pretrained(root / "model")
    paths = write_pictures(root / "pictures", 12)
    embed(root / "pictures", root / "model", root / "store")
    return root, paths


def test_a_picture_finds_itself_and_its_caption(made):
    root, paths = made
    hits = search(root / "store", str(paths[5]), k=3)
    assert len({hit.row for hit in hits}) == 3
    assert hits[0].path == str(paths[5])
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[0].caption == CAPTIONS[5]
    assert hits[0].captions == (CAPTIONS[5], "another")
    assert (hits[0].kind, hits[0].key) == ("image", "005.png")
    assert f"{paths[5]}  {CAPTIONS[5]}" in str(hits[0])
    assert hits[0].score >= hits[1].score >= hits[2].score


def test_words_are_compared_with_every_picture(made):
    root, paths = made
    store, model = Store.open(root / "store"), pretrained()
    hits = search(store, CAPTIONS[0], k=12, model=model)
    scores = model.encode_image(paths) @ model.encode_text(CAPTIONS[0])[0]
    assert [hit.path for hit in hits] == [str(paths[i]) for i in scores.argsort(descending=True)]
    assert np.allclose([hit.score for hit in hits], scores.sort(descending=True).values, atol=1e-6)
    assert any(hit.caption is None for hit in hits)


def test_another_model_is_refused(made):
    with pytest.raises(ConfigError, match="made by another model"):
        search(made[0] / "store", "red", model=pretrained(seed=1))


def test_a_picture_that_is_not_there_is_no_query_of_words(made, tmp_path):
    root, paths = made
    for query in ("none.png", tmp_path / "none"):
        with pytest.raises(MissingInputError, match="no such picture"):
            search(root / "store", query)
    assert len(search(root / "store", "what is in none.png?", k=2)) == 2
    assert len(search(root / "store", "red " * 2000, k=2)) == 2


def test_a_small_copy_of_a_picture_finds_it(made, tmp_path):
    root, paths = made
    copy = tmp_path / "copy.png"
    pictures(12)[7].resize((33, 40)).save(copy)
    assert search(root / "store", copy, k=1)[0].path == str(paths[7])
