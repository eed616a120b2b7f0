"""What zero-shot classification says of a class: templates with ``{}`` for its name, built in or from a file, and names
of classes that are better than those of folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from multiway.config import nearest
from multiway.data.records import parse_json, utf8
from multiway.errors import ConfigError, MissingInputError, RecordError

T = TypeVar("T")

BARE = "{}"
"""The name and nothing else."""

SETS = {
    "photos": (
        "a photograph showing a {}",
        "a picture that someone took of a {}",
        "a {}, seen from very near",
        "a {}, seen from far away",
        "a dim and grainy snapshot with a {} in it",
        "a sharp photograph with a {} in the middle",
        "part of a {}, cut off by the edge of the picture",
        "outdoors or indoors, there is a {}",
    ),
    "symbols": (
        "a small drawing of {}",
        "an icon that stands for {}",
        "the symbol called {}",
        "a coloured sign that means {}",
        "{}, drawn in flat colours on a white ground",
        "{} as a simple cartoon",
    ),
    "satellite": (
        "land seen from above: {}",
        "{}, as a satellite sees it",
        "an aerial view in which the ground is {}",
        "a tile of a map made of pictures, showing {}",
        "{}, from a great height",
    ),
    "digits": (
        "the digit {}",
        "the number {}, written by hand",
        "a {}, as someone writes it with a pen",
        "a single figure: {}",
        "a scan of a handwritten {}",
    ),
    "textures": (
        "a surface that looks {}",
        "{} material, seen from very near",
        "a {} pattern that fills the picture",
        "something whose texture is {}",
        "a sample of something {}",
    ),
}
"""Templates for kinds of pictures, in our own words."""


def templates(source: str | Path) -> tuple[str, ...]:
    """The templates of a built-in set, or of a text file: one a line, ``{}`` in each; empty lines do not count.

    Raises ConfigError for a line without ``{}`` and a file without templates, MissingInputError when it is neither.
    """
    if (own := SETS.get(str(source))) is not None:
        return own
    if not Path(source).is_file():
        near = nearest(str(source), list(SETS))
        raise MissingInputError(f"{source}: no such file, and no built-in prompts ({', '.join(SETS)}){near}")
    found = _read(Path(source), _lines)
    if not found:
        raise ConfigError(f"{source}: no prompt in it, expected one a line")
    return checked(found, str(source))


def checked(found: Iterable[str], source: str = "prompts") -> tuple[str, ...]:
    """The templates. Raises ConfigError for one without ``{}``, which would say the same of every class."""
    found = tuple(found)
    for template in found:
        if BARE not in template:
            raise ConfigError(f"{source}: {template!r} has no {{}}, where the name of the class goes")
    return found


def filled(names: Sequence[str], found: Iterable[str]) -> list[list[str]]:
    """What the templates say of each class."""
    found = checked(found)
    return [[template.replace(BARE, name) for template in found] for name in names]


def class_names(labels: Sequence[str], source: str | Path | None = None) -> list[str]:
    """What the classes are called in prompts, in the order of their labels, which are folders' names.

    ``source``: a JSON file ``{label: name}`` with every label, or a text file with a name a line in the order of the
    labels; None = the labels, spaces for underscores. Raises ConfigError when names and labels do not go together,
    MissingInputError without the file.
    """
    if source is None:
        return [label.replace("_", " ") for label in labels]
    path = Path(source)
    if path.suffix.lower() != ".json":
        names = _read(path, _lines)
        if len(names) != len(labels):
            raise ConfigError(
                f"{path}: {len(names)} names for {len(labels)} classes; expected a line each, in the order "
                f"{', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}"
            )
        return names
    given = _read(path, parse_json)
    missing, unknown = set(labels) - set(given), set(given) - set(labels)
    if missing or unknown:
        raise ConfigError(
            f"{path}: expected a name for every label; missing {', '.join(sorted(missing)[:5]) or 'none'}, not labels "
            f"of the data {', '.join(sorted(unknown)[:5]) or 'none'}"
        )
    if wrong := [label for label in labels if not isinstance(given[label], str) or not given[label].strip()]:
        raise ConfigError(f"{path}: the name of {wrong[0]!r} is {given[wrong[0]]!r}, expected words")
    return [given[label] for label in labels]


def _lines(data: bytes) -> list[str]:
    """Lines with something in them."""
    return [line.strip() for line in utf8(data).splitlines() if line.strip()]


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    """The content of a file. Raises MissingInputError when it cannot be read, ConfigError when it cannot be parsed."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}") from error
    except RecordError as error:
        raise ConfigError(f"{path}: {error}") from error
