"""One word per idea: names that the house does not use."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.house.source import ROOT, Source, parse, sources

VAGUE_FILES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core"}
CONFIG_ARGUMENTS = {"cfg", "config", "args"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|opt/(?:wheels|pypi))(?:/|\b)")


def bare_masks(module: Source) -> list[str]:
    """Arguments, variables, attributes and fields called ``mask``: pad, hide and keep say which way round it is."""
    found = []
    for node in ast.walk(module.tree):
        named = (
            (isinstance(node, ast.arg) and node.arg == "mask")
            or (isinstance(node, ast.Name) and node.id == "mask" and isinstance(node.ctx, ast.Store))
            or (isinstance(node, ast.Attribute) and node.attr == "mask" and isinstance(node.ctx, ast.Store))
        )
        if named:
            found.append(f"{module.path}:{node.lineno}: mask")
    return found


def configs_inside(module: Source) -> list[str]:
    """Leaves and backbones take values and built parts, never a settings object."""
    if not module.name.startswith(("multiway.nn", "multiway.backbones")):
        return []
    arguments = [node for node in ast.walk(module.tree) if isinstance(node, ast.arg)]
    return [f"{module.path}:{arg.lineno}: {arg.arg}" for arg in arguments if arg.arg in CONFIG_ARGUMENTS]


def vague(module: Source) -> list[str]:
    """Files that say nothing about what is in them."""
    return [str(module.path)] if VAGUE_FILES & set(module.name.split(".")) else []


@pytest.mark.parametrize("rule", [bare_masks, configs_inside, vague], ids=lambda rule: rule.__name__)
def test_the_names_keep_the_rule(rule):
    found = [name for module in sources() for name in rule(module)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (bare_masks, "multiway.nn.x", "def f(mask): ..."),
        (bare_masks, "multiway.nn.x", "self.mask = 1"),
        (bare_masks, "multiway.nn.x", "for mask in x: ..."),
        (configs_inside, "multiway.backbones.x", "def f(config): ..."),
        (vague, "multiway.nn.utils", ""),
    ],
)
def test_the_rule_finds_a_planted_name(rule, name, text):
    assert rule(parse(name, text, Path("planted.py")))


def test_no_path_of_one_machine_is_written_down():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    paths = [ROOT / name for name in tracked.split("\0") if name] or [module.path for module in sources()]
    found = []
    for path in paths:
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{path}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert not found, "\n" + "\n".join(found)
