"""Every model by name: those of ``PRESETS`` in the modules of `multiway.systems`, found by reading that folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from multiway import systems
from multiway.config import nearest
from multiway.errors import ConfigError


@cache
def all_systems() -> dict[str, ModuleType]:
    """Every module of the systems folder that has models, by its short name."""
    found = [importlib.import_module(f"{systems.__name__}.{m.name}") for m in pkgutil.iter_modules(systems.__path__)]
    return {module.__name__.rpartition(".")[2]: module for module in found if hasattr(module, "PRESETS")}


def presets() -> dict[str, tuple[ModuleType, Any]]:
    """The system and config of every model."""
    return {name: (system, shape) for system in all_systems().values() for name, shape in system.PRESETS.items()}


def model_named(name: str) -> tuple[ModuleType, Any]:
    """The system and config of one model. Raises ConfigError for an unknown name, with the nearest one."""
    known = presets()
    if name not in known:
        raise ConfigError(f"unknown model {name!r}{nearest(name, list(known))}; list_models() names them all")
    return known[name]


def model_class(system: ModuleType) -> Any:
    """The system's model: its one class that states what it accepts."""
    own = [x for x in vars(system).values() if isinstance(x, type) and x.__module__ == system.__name__]
    [found] = [x for x in own if hasattr(x, "accepts")]
    return found


def blank(system: ModuleType, shape: Any) -> nn.Module:
    """The model with config ``shape`` without memory for its weights."""
    with torch.device("meta"):
        return model_class(system)(shape)
