"""Recipes to typed runs: dotted overrides, saving, loading. Knows dataclasses, not what is in them."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from multiway.errors import ConfigError, MissingInputError

T = TypeVar("T")


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a nested dataclass as (dotted name, value)."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def override(config: T, arguments: Sequence[str]) -> T:
    """Return the config with ``--dotted.name value`` arguments applied and checked against its types.

    Raises ConfigError with the nearest name for an unknown one, and with the expected type for a bad value.
    """
    names = dict(flatten(config))
    for argument in arguments:
        if argument.startswith("--"):
            _known(argument[2:].split("=")[0], names)
    parser = _parser(config)
    try:
        return _build(config, parser.parse_args(list(arguments)))
    except Exception as error:
        raise ConfigError(_message(error)) from error


def apply(config: T, values: Mapping[str, Any]) -> T:
    """Return the config with a nested mapping of values applied, as read from a saved run."""
    names = dict(flatten(config))
    for name in _dotted(values, names):
        _known(name, names)
    parser = _parser(config)
    try:
        return _build(config, parser.parse_object({k: v for k, v in values.items() if v != {}}))
    except Exception as error:
        raise ConfigError(_message(error)) from error


def save(config: Any, path: Path) -> None:
    """Write a config as JSON, aside and then renamed."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read a saved config as a nested mapping; `apply` it to the recipe it names."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; a run folder keeps its settings in run.json")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict) or "recipe" not in values:
        raise ConfigError(f"{path}: a saved run is a JSON object with a 'recipe', found {str(values)[:60]}")
    return values


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two nested mappings: dotted name -> (old, new)."""
    result: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result.update(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            result[f"{prefix}{key}"] = (a, b)
    return result


def completed(values: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Saved values with what an earlier version did not know yet: such settings had the effect of their defaults."""
    result = dict(values)
    for field in dataclasses.fields(config):
        own = getattr(config, field.name)
        if dataclasses.is_dataclass(own):
            result[field.name] = completed(values.get(field.name, {}), own)
        elif field.name not in values and field.default is not dataclasses.MISSING:
            result[field.name] = json.loads(json.dumps(field.default))
    return result


def plain(config: Any) -> dict[str, Any]:
    """The config as JSON would give it back (tuples are lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def nearest(name: str, names: Sequence[str]) -> str:
    """A hint naming the closest of ``names``, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # a right name in the wrong group
        close = [other for other in names if other.split(".")[-1] == name.split(".")[-1]][:1]
    return f"; did you mean {close[0]!r}?" if close else ""


def _known(name: str, names: Mapping[str, Any]) -> None:
    parent = name.rpartition(".")[0]
    if name not in names and not isinstance(names.get(parent), dict):
        raise ConfigError(f"unknown setting {name!r}{nearest(name, list(names))}")


def _dotted(values: Mapping[str, Any], names: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in names:
            yield from _dotted(value, names, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _parser(config: Any):  # noqa: ANN202 - jsonargparse is imported late, it costs 0.1 s
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if _is_empty(value):
            continue
        kind = type(value) if dataclasses.is_dataclass(value) else _hint(type(config), field.name)
        parser.add_argument(f"--{field.name}", type=kind, default=value)
    return parser


def _is_empty(value: Any) -> bool:
    """Whether it is a dataclass with nothing to set."""
    return dataclasses.is_dataclass(value) and not dataclasses.fields(value)


def _hint(owner: type, name: str) -> Any:
    from typing import get_type_hints

    return get_type_hints(owner)[name]


def _build(config: T, namespace: Any) -> T:
    """Rebuild the dataclasses from parsed values, so that their own checks run."""
    changes = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        old = getattr(config, field.name)
        if _is_empty(old):
            continue
        new = namespace[field.name]
        if dataclasses.is_dataclass(old):
            new = new if dataclasses.is_dataclass(new) else _build(old, new)
        elif isinstance(old, tuple):
            new = tuple(new)
        changes[field.name] = new
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
