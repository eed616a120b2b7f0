"""Stands in for torchvision, which cannot be imported beside a CPU torch: enough for ``import timm``, nothing works.

Only processes started by the parity tests and the benchmarks have this folder on their path.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _Named(type):
    """Makes classes every attribute of which is its own name, as an enumeration's would be."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


for _name in ("datasets", "models", "ops", "transforms"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _Stub(f"{__name__}.{_name}")
for _name in ("models.feature_extraction", "ops.misc", "transforms.functional"):
    sys.modules[f"{__name__}.{_name}"] = _Stub(f"{__name__}.{_name}")
sys.modules[f"{__name__}.transforms"].functional = sys.modules[f"{__name__}.transforms.functional"]  # type: ignore[attr-defined]
