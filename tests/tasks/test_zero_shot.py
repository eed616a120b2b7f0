"""Zero-shot classification on vectors laid out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from multiway.errors import ConfigError, NumericsError
from multiway.tasks.zero_shot import classifier, evaluate

WORDS = {"east": (1.0, 0.0), "north": (0.0, 1.0), "west": (-1.0, 0.0), "northeast": (math.sqrt(0.5), math.sqrt(0.5))}


def embed_text(texts):
    return torch.tensor([WORDS[text] for text in texts])


def embed_image(images):
    return torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in images])


def test_prompts_are_averaged_to_unit_length():
    vectors = classifier(embed_text, [["east", "north"], ["west"]])
    assert torch.allclose(vectors, torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [-1.0, 0.0]]))


def test_the_nearest_class_wins():
    angles = [0.1, math.pi / 4, 3.0, math.pi / 2 - 0.1]
    prompts = [["east"], ["northeast", "north"], ["west"]]
    assert evaluate(embed_image, embed_text, angles, [0, 1, 2, 1], prompts) == {
        "accuracy": 1.0,
        "chance": pytest.approx(1 / 3),
        "classes": 3,
    }
    assert evaluate(embed_image, embed_text, angles, [0, 1, 2, 0], prompts)["accuracy"] == 0.75


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match="class 1 has no prompt"):
        evaluate(embed_image, embed_text, [0.0], [0], [["east"], []])
    with pytest.raises(ConfigError, match="from 0 to 1"):
        evaluate(embed_image, embed_text, [0.0], [2], [["east"], ["west"]])
    with pytest.raises(NumericsError, match="class 0"):
        evaluate(embed_image, embed_text, [0.0], [0], [["east", "west"]])
