"""What is installed, what is written about it, and that the two agree."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.house.source import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
EXTRAS = PROJECT["optional-dependencies"]


def canonical(requirement: str) -> str:
    """Name of a requirement, as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


def test_every_direct_dependency_is_pinned():
    named = [canonical(r) for r in PROJECT["dependencies"] + sum(EXTRAS.values(), [])]
    assert not [name for name in named if name != PROJECT["name"] and name not in PINS]


def test_torch_is_pinned_without_a_local_version():
    assert "+" not in PINS["torch"]


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_nothing_brought_in_a_package_that_breaks_beside_cpu_torch(name):
    """Where the environment shows a torch from beside it, its neighbours are not ours to judge."""
    assert not (Path(sysconfig.get_path("purelib")) / name).exists()


def test_the_installed_package_is_this_tree():
    code = "import multiway; print(multiway.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert Path(found.strip()) == ROOT / "src" / "multiway" / "__init__.py"
    assert importlib.metadata.version("multiway") == PROJECT["version"]


def test_the_citation_has_the_version():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
