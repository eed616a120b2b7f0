"""Originals to compare with: transformers' models under the names of the hub's files, timm's in its own process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multiway.weights.rename import WeightMap, to_ours, to_theirs

HERE = Path(__file__).parent


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """Weights of a transformers model under the names that files on the hub have."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def saved_gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """Gradients of a transformers model under those names; afterwards they stand in place of its weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return saved(model, folder)


def timms(name: str, path: Path, **settings: Any) -> dict[str, Tensor]:
    """What `timm_reference.py` writes of a model; skips the test where timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    env = os.environ | {"PYTHONPATH": str(HERE / "stubs"), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HERE / "timm_reference.py"), name, json.dumps(settings), str(path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return load_file(path)


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def fill(model: nn.Module, state: dict[str, Tensor], layout: WeightMap) -> None:
    """Give a model of ours an original's weights, which must come back as they were."""
    model.load_state_dict(to_ours(state, layout, model.state_dict()))
    back = to_theirs(model.state_dict(), layout)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def check_gradients(model: nn.Module, theirs: dict[str, Tensor], layout: WeightMap, within: float = 1e-5) -> None:
    """Every parameter takes part and has the original's gradient, ``within`` a share of its norm."""
    want = to_ours(theirs, layout, model.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and want[name].norm() > 0, f"{name} does not take part"
        assert (parameter.grad - want[name]).norm() <= within * want[name].norm(), name
