"""Models and tasks that do and do not fit."""

from __future__ import annotations

import pytest

from multiway.errors import ConfigError
from multiway.models import all_systems, model_class
from multiway.systems.beit3 import BEiT3
from multiway.tasks import zero_shot
from multiway.tasks.needs import FITTING, check
from multiway.tasks.retrieval import ImageTextContrast

IMAGE, TEXT, BOTH = frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})


class Towers:
    accepts = frozenset({IMAGE, TEXT})


class Vision:
    accepts = frozenset({IMAGE})


@pytest.mark.parametrize("needs", [zero_shot.NEEDS, ImageTextContrast.needs])
def test_what_fits_passes(needs):
    check(Towers(), needs)
    check(BEiT3, needs)


def test_the_message_says_what_would_fit():
    with pytest.raises(ConfigError) as error:
        check(Vision(), zero_shot.NEEDS, "zero-shot classification")
    assert str(error.value).startswith(
        "zero-shot classification needs a model that encodes image alone, and text alone; Vision encodes image alone, "
        "so text alone is missing"
    )
    with pytest.raises(ConfigError, match="so image with text is missing"):
        check(Towers(), frozenset({BOTH}))


def test_the_systems_that_are_named_fit() -> None:
    """And of texts, and of both together, all that do are named."""
    found = {name: model_class(system).accepts for name, system in all_systems().items()}
    for modalities, names in FITTING.items():
        fitting = {name for name, accepts in found.items() if modalities in accepts}
        named = set(names.split(", "))
        assert named <= fitting
        assert modalities == {"image"} or named == fitting
