"""No system escapes the contracts."""

from __future__ import annotations

import pkgutil

import multiway.systems
from tests.contracts.toys import TOYS


def test_every_system_has_a_toy() -> None:
    systems = {f"multiway.systems.{module.name}" for module in pkgutil.iter_modules(multiway.systems.__path__)}
    assert systems == {toy.build().apply_model(lambda model: type(model).__module__) for toy in TOYS}
