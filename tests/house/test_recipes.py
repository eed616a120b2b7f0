"""Every recipe gives a run that can be stored, read back and built, without memory for its weights."""

from __future__ import annotations

import ast
import importlib

import pytest

from tests.house.source import sources


def recipes() -> list[tuple[str, str]]:
    """(module, function) of every public function in ``multiway.recipes`` that returns a Run and needs no argument."""
    found = []
    for module in sources():
        if not module.name.startswith("multiway.recipes."):
            continue
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "Run":
                needed = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
                if not node.name.startswith("_") and not needed:
                    found.append((module.name, node.name))
    return found


RECIPES = recipes()
every_recipe = pytest.mark.parametrize(("module", "name"), RECIPES, ids=[f"{m.split('.')[-1]}.{n}" for m, n in RECIPES])


@every_recipe
def test_a_run_is_the_same_after_saving(module, name, tmp_path):
    from multiway import config

    run = getattr(importlib.import_module(module), name)()
    assert run.recipe == f"{module.rpartition('.')[2]}.{name}"
    config.save(run, tmp_path / "run.json")
    assert config.apply(run, config.read(tmp_path / "run.json")) == run


@every_recipe
def test_a_recipe_says_how_it_was_run(module, name):
    """The command, the hardware and the result, or the admission that there is none."""
    text = " ".join((getattr(importlib.import_module(module), name).__doc__ or "").split())
    assert f"multiway train {module.rpartition('.')[2]}.{name}" in text
    assert "not yet run by us" in text.lower() or "commit" in text


@every_recipe
def test_the_model_builds_without_memory(module, name):
    import torch

    from multiway.rehearsal import made_up_words

    recipe = importlib.import_module(module)
    run = getattr(recipe, name)()
    with torch.device("meta"):
        objective, _ = recipe.assemble(run, made_up_words(run))
    parameters = list(objective.parameters())
    assert parameters
    assert all(parameter.is_meta for parameter in parameters)
