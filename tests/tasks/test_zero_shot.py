"""Zero-shot classification on vectors laid out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from multiway.errors import ConfigError, NumericsError
from multiway.tasks.zero_shot import classifier, compare, evaluate
from tests.tiny import COLOURS, pictures, pretrained

WORDS = {"east": (1.0, 0.0), "north": (0.0, 1.0), "west": (-1.0, 0.0), "northeast": (math.sqrt(0.5), math.sqrt(0.5))}
WORDS["northnorth"] = (-math.sqrt(0.5), math.sqrt(0.5))


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
        "class_accuracy": 1.0,
        "top5": 1.0,
        "chance": pytest.approx(1 / 3),
        "classes": 3,
    }
    found = evaluate(embed_image, embed_text, angles, [0, 1, 2, 0], prompts)
    assert (found["accuracy"], found["class_accuracy"]) == (0.75, pytest.approx((0.5 + 1 + 1) / 3))


def test_prompts_are_compared_and_everything_is_embedded_once():
    calls = []

    def image(angles):
        calls.append(len(angles))
        return embed_image(angles)

    def text(texts):
        calls.append(texts)
        return embed_text(texts)

    angles = [0.1, math.radians(60), math.radians(80)]
    found = compare(image, text, angles, [0, 0, 1], ["east", "north"], ["north{}", "north{}", "{}"])
    assert calls == [["northeast", "east", "northnorth", "north"], 3]
    # The border between both classes is at 90 degrees, at 45, and of both prompts together at 67.5.
    assert found["prompts"] == pytest.approx({"north{}": 2 / 3, "{}": 2 / 3})
    assert found["accuracy"] == 1.0
    alone = compare(embed_image, embed_text, angles, [0, 0, 1], ["east", "north"], ["north{}"])
    assert alone["accuracy"] == alone["prompts"]["north{}"] == pytest.approx(2 / 3) and "{}" in alone["prompts"]


@pytest.mark.parametrize("prompts", [("{}",), ("a {} square", "a {} circle", "{}")])
def test_a_loaded_model_gives_probabilities(prompts):
    made, images = pretrained(), pictures(5)
    got = made.zero_shot(images, COLOURS, prompts)
    texts = [[prompt.replace("{}", colour) for prompt in prompts] for colour in COLOURS]
    cosines = made.encode_image(images) @ classifier(made.encode_text, texts).T
    assert torch.allclose(got, (cosines / 0.07).softmax(1), atol=1e-6)
    assert torch.allclose(made.zero_shot(images[0], COLOURS, prompts), got[:1], atol=1e-6)
    assert (got.argmax(1) == cosines.argmax(1)).all()
    with pytest.raises(ConfigError, match="no {}"):
        made.zero_shot(images, COLOURS, ["a picture"])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match="class 1 has no prompt"):
        evaluate(embed_image, embed_text, [0.0], [0], [["east"], []])
    with pytest.raises(ConfigError, match="from 0 to 1"):
        evaluate(embed_image, embed_text, [0.0], [2], [["east"], ["west"]])
    with pytest.raises(NumericsError, match="class 0"):
        evaluate(embed_image, embed_text, [0.0], [0], [["east", "west"]])
