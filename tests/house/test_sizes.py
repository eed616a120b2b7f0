"""Sizes are guides: printed by `make lines`, a failure only when a file has become absurd."""

from __future__ import annotations

import ast

import pytest

from tests.house.sizes import depth, lines, report
from tests.house.source import sources

ABSURD = 800


def test_no_file_is_absurd():
    print(report())
    assert not [f"{module.path}: {lines(module)} lines" for module in sources() if lines(module) > ABSURD]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 1", 0),
        ("if a:\n  for b in c:\n   pass", 2),
        ("if a:\n  pass\n elif b:\n  pass\n elif c:\n  pass", 1),
        ("if a:\n  pass\n else:\n  while b:\n   pass", 2),
        ("try:\n  with a:\n   pass\n finally:\n  pass", 2),
    ],
)
def test_nesting_counts_blocks_and_not_elif(body, expected):
    assert depth(ast.parse(f"def f():\n {body}").body[0]) == expected
