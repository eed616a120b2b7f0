"""What retrieval reports, on encoders whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from multiway.errors import ConfigError
from multiway.tasks.retrieval import evaluate
from tests.tiny import CAPTIONS, pictures, pretrained

COLOURS = ["red", "green", "blue", "white"]


def embed_image(images):
    return F.normalize(torch.eye(len(COLOURS))[images], dim=1)


def embed_text(texts):
    return torch.stack([torch.eye(len(COLOURS))[COLOURS.index(text.split()[0])] for text in texts])


def test_a_perfect_encoder_finds_everything():
    captions = ["blue a", "red a", "white a", "green a", "red b"]
    result = evaluate(embed_image, embed_text, torch.arange(4), captions, [2, 0, 3, 1, 0])
    assert result["candidates"] == 4
    assert result["captions"] == 5
    assert result["image_to_text"] == result["text_to_image"] == {"r1": 1.0, "r5": 1.0, "r10": 1.0}
    assert result["chance"]["text_to_image"] == {"r1": 0.25, "r5": 1.0, "r10": 1.0}
    assert result["chance"]["image_to_text"]["r1"] == pytest.approx((2 / 5 + 3 / 5) / 4)


def test_a_blind_encoder_scores_chance():
    def same(items):
        return torch.ones(len(items), 3) / 3**0.5

    result = evaluate(same, same, torch.arange(20), [str(i) for i in range(20)])
    for way in ("image_to_text", "text_to_image"):
        assert result[way] == pytest.approx(result["chance"][way])
    assert result["chance"]["image_to_text"] == pytest.approx({"r1": 0.05, "r5": 0.25, "r10": 0.5})


@pytest.mark.parametrize("owner", [[0, 1], [0, 1, 1, 2], [0, 1, 4, 3], np.array([1, 2, 3, 4])])
def test_owners_must_cover_the_pictures(owner):
    with pytest.raises(ConfigError, match="owners"):
        evaluate(embed_image, embed_text, torch.arange(4), ["red"] * 4, owner)


def test_a_real_encoder_is_measured_by_its_own_vectors():
    made = pretrained()
    images, texts = pictures(25), CAPTIONS
    result = evaluate(made.encode_image, made.encode_text, images, texts)
    scores = made.encode_image(images) @ made.encode_text(texts).T
    for way, own in (("image_to_text", scores), ("text_to_image", scores.T)):
        place = (own > own.diagonal()[:, None]).sum(1)
        assert result[way] == pytest.approx({f"r{k}": float((place < k).float().mean()) for k in (1, 5, 10)})
        assert result[way]["r1"] < 0.3  # it is random
