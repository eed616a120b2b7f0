"""Recipes: functions that return a run, one module per system."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from multiway.config import nearest
from multiway.errors import ConfigError
from multiway.run import Run


def names() -> Iterator[tuple[str, str]]:
    """Every recipe as (``module.function``, first line of its docstring), read from the source: nothing is imported."""
    for found in pkgutil.iter_modules(__path__):
        tree = ast.parse((Path(__path__[0]) / f"{found.name}.py").read_text())
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or node.returns is None or node.name.startswith("_"):
                continue
            given = node.args
            takes_nothing = not (given.posonlyargs or given.args or given.kwonlyargs)
            if ast.unparse(node.returns) == "Run" and takes_nothing:
                yield f"{found.name}.{node.name}", (ast.get_docstring(node) or "").split("\n")[0]


def recipe(name: str) -> tuple[Run, ModuleType]:
    """The run a recipe returns, and its module, whose ``build(run, out)`` makes the job.

    Raises ConfigError for an unknown name, with the nearest one.
    """
    known = [known for known, _ in names()]
    if name not in known:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, known)}; `multiway list` names them all")
    module = importlib.import_module(f"{__name__}.{name.partition('.')[0]}")
    return getattr(module, name.partition(".")[2])(), module
