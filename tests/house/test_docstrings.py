"""Everything public says what it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.house.source import parse, sources

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(name: str, node: Documented) -> Iterator[tuple[str, Documented]]:
    """A module or class and its public members, without overloads and setters: they are documented once."""
    yield name, node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for member in node.body:
        if not isinstance(member, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or member.name.startswith("_"):
            continue
        marks = [ast.unparse(mark) for mark in member.decorator_list]
        if not any(mark.endswith(("overload", ".setter", ".register")) for mark in marks):
            yield from public(f"{name}.{member.name}", member)


def silent(name: str, tree: ast.Module) -> list[str]:
    """Public names without a docstring of at least one sentence."""
    return [
        f"{where} (line {getattr(node, 'lineno', 1)})"
        for where, node in public(name, tree)
        if not (ast.get_docstring(node) or "").split("\n\n")[0].rstrip().endswith((".", ":", "?", ")"))
    ]


def test_everything_public_has_a_docstring():
    found = [where for module in sources() for where in silent(module.name, module.tree)]
    assert not found, "no docstring, or its first paragraph is not a sentence:\n" + "\n".join(found)


PLANTED = '''"""A module."""
class A:
    """A class."""
    def f(self): pass
    def _g(self): pass
def h():
    """words"""
'''


def test_a_missing_docstring_is_found():
    planted = parse("multiway.planted", PLANTED, Path("planted.py"))
    found = [where.split()[0] for where in silent(planted.name, planted.tree)]
    assert found == ["multiway.planted.A.f", "multiway.planted.h"]
