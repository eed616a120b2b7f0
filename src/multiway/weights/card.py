"""The card of a model: the ``README.md`` that people and the hub read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from multiway.errors import ConfigError

FIELDS = ("title", "text", "license", "tags", "figures")

USE = """```python
import multiway

model = multiway.load(".")  # this folder, or its name on the hub
model.encode_text("what to look for") @ model.encode_image("picture.jpg").T
```"""


def model_card(system: str, card: Mapping[str, Any] | str) -> str:
    """Write a card: a header for the hub, what the model is, how it is used, and what it reached.

    ``card``: the text, or ``{"title", "text", "license", "tags", "figures"}``, all optional; ``license``: as the hub
    names it, "other" until somebody decides; ``figures``: nested mappings to numbers.

    Raises ConfigError for other fields.
    """
    card = {"text": card} if isinstance(card, str) else card
    unknown = [key for key in card if key not in FIELDS]
    if unknown:
        raise ConfigError(f"the card has {', '.join(unknown)}, expected only {', '.join(FIELDS)}")
    tags = dict.fromkeys(["multiway", system, *card.get("tags", ())])
    header = {"license": card.get("license", "other"), "library_name": "multiway", "tags": list(tags)}
    rows = [f"| {name} | {value:.4g} |" for name, value in _named(card.get("figures", {}))]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {card.get('title', system)}",
        card.get("text", ""),
        USE,
        "\n".join(["| figure | value |", "|---|---|", *rows]) if rows else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _named(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings by their joined names."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value
