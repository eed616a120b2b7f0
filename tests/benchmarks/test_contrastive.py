"""The contrastive benchmark compares equal losses and reports every figure."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.house.source import ROOT


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_it_measures_steps_and_memory() -> None:
    given = {"size": "tiny", "batch": 4, "large": 8, "large-size": "tiny", "micros": 2, "repeats": 1, "threads": 1}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "contrastive.py"), "--dtypes", "fp32"]
    command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    losses = list(result["losses"].values())
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-4) and "ours" in result["losses"]
    names = result["figures"].keys()
    assert {"transformers padded fp32", "transformers longest fp32", "memory plain fp32", "memory cached fp32"} <= names
    assert all(0 < own["low"] <= own["median"] <= own["high"] for own in result["figures"].values())
