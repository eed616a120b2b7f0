"""The package's source as the house tests read it: syntax trees, never imported modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"


@dataclass(frozen=True)
class Source:
    """One module: dotted ``name``, ``path``, syntax ``tree``, and the ``package`` its relative imports start from."""

    name: str
    path: Path
    tree: ast.Module
    package: str


def part(name: str) -> str:
    """The module or package directly under ``multiway`` that a name lies in; "multiway" for the package itself."""
    return name.split(".")[1] if "." in name else name


def parse(name: str, text: str, path: Path, is_package: bool = False) -> Source:
    """A module from its text."""
    package = name if is_package else name.rpartition(".")[0]
    return Source(name, path, ast.parse(text, filename=str(path)), package)


@cache
def sources() -> tuple[Source, ...]:
    """Every module under ``src/multiway``, by path."""
    found = []
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found.append(parse(".".join(parts[:-1] if is_package else parts), path.read_text("utf-8"), path, is_package))
    return tuple(found)


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports, wherever it does, with ``from a import b`` as ``a.b``."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = source.package.split(".")[: source.package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def called(node: ast.Call) -> str:
    """Dotted name of what a call calls, as written; "" when it is not a name."""
    return dotted(node.func)


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of attributes on a name; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
