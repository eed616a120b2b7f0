"""What retrieval reports, on encoders whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multiway.errors import ConfigError, NumericsError
from multiway.systems import clip
from multiway.tasks.retrieval import evaluate, match, require_match
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


# ---------------------------------------------------------------------------------------------------------- re-ranking


def ring(count):
    """Unit vectors around a circle."""
    angle = torch.arange(count) * (2 * np.pi / count)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def off_by_two(top, rerank, count=12):
    """A dual encoder that takes every caption for its neighbour's but one, and what ``rerank`` makes of its nearest."""
    image = ring(count)
    return evaluate(lambda _: image, lambda _: image.roll(2, 0), range(count), [""] * count, None, rerank, top)


def judge(pictures, texts):
    """It knows which belong together."""
    return torch.from_numpy((pictures == texts).astype(np.float32))


def test_a_perfect_judge_finds_what_is_among_the_nearest():
    # Both ways the right answer is two steps on the circle away, as another one is: the fourth or fifth nearest.
    plain = {"r1": 0.0, "r5": 1.0, "r10": 1.0}
    for top, r1 in ((2, 0.0), (3, 0.0), (5, 1.0), (32, 1.0)):
        found = off_by_two(top, judge)
        assert found["image_to_text"] == found["text_to_image"] == plain
        for way in ("image_to_text", "text_to_image"):
            assert found["reranked"][way] == {"r1": r1, "r5": 1.0, "r10": 1.0}, top
        assert found["reranked"]["top"] == top
    assert "reranked" not in off_by_two(32, None)


def test_every_pair_is_scored_once_and_picture_by_picture():
    seen = []

    def watch(pictures, texts):
        seen.append((pictures, texts))
        return judge(pictures, texts)

    found = off_by_two(5, watch)
    ((pictures, texts),) = seen
    assert len(pictures) == found["reranked"]["pairs"] == len(set(zip(pictures.tolist(), texts.tolist(), strict=True)))
    assert (np.diff(pictures) >= 0).all()
    assert found["reranked"]["pairs"] == 60  # five each, and both ways the same ones
    assert off_by_two(100, watch)["reranked"]["pairs"] == 144


def test_a_blind_judge_gives_chance_among_the_nearest():
    found = off_by_two(5, lambda pictures, texts: torch.zeros(len(pictures)))
    assert found["reranked"]["image_to_text"] == pytest.approx({"r1": 0.2, "r5": 1.0, "r10": 1.0})
    all_of_them = off_by_two(12, lambda pictures, texts: torch.zeros(len(pictures)))
    assert all_of_them["reranked"]["text_to_image"] == pytest.approx(all_of_them["chance"]["text_to_image"])


def test_what_cannot_be_re_ranked_is_refused():
    with pytest.raises(ConfigError, match="1 or more candidates"):
        off_by_two(0, judge)
    with pytest.raises(NumericsError, match="re-ranks has diverged"):
        off_by_two(3, lambda pictures, texts: torch.full((len(pictures),), torch.nan))


class Judge(nn.Module):
    """Finds the colour of a picture's first pixel in a text's second token; reads both together."""

    accepts = frozenset({frozenset({"image", "text"})})
    leading = 2

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(image_px=(8, 16), patch=4)
        self.match_head = nn.Identity()
        self.plans = []

    def match(self, plan, *, image, text):
        self.plans.append(plan)
        first = text[plan.starts["text"] - plan.extent("text")[0] + 1]
        return (first == image[:, 0, 0, 0]).double()


def test_pairs_are_laid_out_as_the_model_wants_them():
    judge, image = Judge(), torch.zeros(3, 3, 8, 16, dtype=torch.uint8)
    image[:, 0, 0, 0] = torch.tensor([7, 8, 9])
    got = match(judge, image, [torch.tensor([0, 7, 2]), torch.tensor([0, 7, 8, 2]), torch.tensor([0, 9])])
    assert got.tolist() == [1, 0, 1] and got.dtype == torch.float32
    (plan,) = judge.plans
    assert [(s.modality, s.kind, s.rows) for s in plan.segments] == [
        ("image", "pair", 3 * (2 + 8)),
        ("text", "pair", 9),
    ]


def test_models_that_cannot_re_rank_are_told_what_could():
    require_match(Judge())
    without = Judge()
    del without.match_head
    with pytest.raises(ConfigError, match="this Judge has none"):
        require_match(without)
    with pytest.raises(ConfigError, match="re-ranking needs a model that encodes image with text; CLIP encodes"):
        require_match(clip.CLIP(clip.PRESETS["clip_vit_tiny_patch8_64"]))
    with pytest.raises(ConfigError, match="such as a VLMo or FLAVA has; this BEiT3"):
        require_match(pretrained().model)
