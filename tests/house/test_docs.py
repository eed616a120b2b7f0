"""The documentation builds without a warning, and holds the reference."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.source import ROOT, part, sources


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "index.html").exists()
    for name in {part(module.name) for module in sources()}:
        if not name.startswith("_") and name != "multiway":
            page = (tmp_path / "reference" / f"{name}.html").read_text(encoding="utf-8")
            assert f'id="multiway.{name}"' in page
