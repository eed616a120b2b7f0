from __future__ import annotations

import numpy as np
import torch

from multiway.nn.quantize import PatchCodebook

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
