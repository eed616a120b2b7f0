"""Which models a task can use."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from multiway.errors import ConfigError

Modalities = frozenset[str]

FITTING = {
    frozenset({"image"}): "vit, swin, beit, beit3, clip",
    frozenset({"text"}): "beit3, clip, flava, siglip, vlmo",
    frozenset({"image", "text"}): "beit3, flava, vlmo",
}
"""Systems that encode a set of modalities: all, of pictures alone some."""


def check(model: Any, needs: Set[Modalities], task: str = "this task") -> None:
    """Raise ConfigError, saying what would fit, unless the model encodes every set of modalities a task needs.

    ``model.accepts`` and ``needs``: sets of sets of modalities, ``{image, text}`` being both together in one encoder.
    """
    missing = needs - model.accepts
    if missing:
        fitting = "; ".join(f"{_said([own])}: {FITTING[own]}" for own in sorted(missing, key=sorted) if own in FITTING)
        raise ConfigError(
            f"{task} needs a model that encodes {_said(needs)}; {type(model).__name__} encodes {_said(model.accepts)}, "
            f"so {_said(missing)} is missing. Choose another task, or a model that does ({fitting or 'none here'})"
        )


def _said(sets: Iterable[Modalities]) -> str:
    """``image alone, and image with text``."""
    words = [" with ".join(sorted(own)) if len(own) > 1 else f"{next(iter(own))} alone" for own in sets]
    return ", and ".join(sorted(words)) or "nothing"
