"""Who may import whom. The arrows point strictly down; the tables below are the design."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.house.source import Source, called, dotted, imports, parse, part, sources

CONTRACTS = {"errors", "types", "plan", "run", "config"}
PARTS = {"nn", "data", "metrics", "weights"}
BUILT = {"backbones", "objectives"}
SYSTEMS = {"systems", "tasks", "engine"}
NAMED = {"models", "told", "published", "preprocessor", "pretrained", "evaluation", "answers"}
USES = NAMED | {"recipes", "search", "convert", "reference", "estimate", "roofline", "rehearsal"}
OUTSIDE = {"cli", "commands", "serve", "quickstart", "diagnose", "report"}

MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(CONTRACTS, CONTRACTS),
    **dict.fromkeys(PARTS, CONTRACTS),
    "nn": {"errors", "types", "plan"},  # nn never sees a config
    "backbones": {"errors", "types", "plan", "nn"},
    "objectives": {"errors"},
    **dict.fromkeys(SYSTEMS, CONTRACTS | PARTS | BUILT),
    **dict.fromkeys(USES, CONTRACTS | PARTS | BUILT | SYSTEMS | NAMED),
    **dict.fromkeys({"estimate", "roofline"}, CONTRACTS | PARTS | BUILT | SYSTEMS | {"roofline", "rehearsal"}),
    **dict.fromkeys(OUTSIDE, CONTRACTS | PARTS | BUILT | SYSTEMS | USES | {"report"}),
    **dict.fromkeys({"cli", "commands"}, CONTRACTS | PARTS | BUILT | SYSTEMS | USES | OUTSIDE),
    "__main__": {"cli"},
    "multiway": {"pretrained", "errors"},  # the names users type, imported when first used
}


BANNED_IMPORTS = ("torchvision", "torchaudio", "torchcodec", "pickle", "cloudpickle", "dill", "shelve", "marshal")
BANNED_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
BANNED_KEYWORDS = {"shell": True, "allow_pickle": True, "weights_only": False}


def breaches(module: Source) -> list[str]:
    """Imports that the table does not allow."""
    here = part(module.name)
    if here not in MAY_IMPORT:
        return [f"{module.path}: {here!r} has no place in the layers; give it one in MAY_IMPORT"]
    return [
        f"{module.path}:{line}: {here} imports {name}"
        for line, name in imports(module)
        if name.split(".")[0] == "multiway" and part(name) not in {here, "__version__"} | MAY_IMPORT[here]
    ]


def distributed(module: Source) -> list[str]:
    """Uses of ``torch.distributed`` outside the engine."""
    if part(module.name) == "engine":
        return []
    used = [(node.lineno, dotted(node)) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    return [
        f"{module.path}:{line}: {name}"
        for line, name in [*imports(module), *used]
        if f"{name}.".startswith("torch.distributed.")
    ]


def unsafe(module: Source) -> list[str]:
    """Imports and calls that run foreign code, need a compiled package we refuse, or unpack archives to disk."""
    found = [(line, name) for line, name in imports(module) if name.split(".")[0] in BANNED_IMPORTS]
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        name = called(node)
        if name in BANNED_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr == "extractall"):
            found.append((node.lineno, f"{ast.unparse(node.func)}()"))
        if name == "torch.load" and keywords.get("weights_only") is not True:
            found.append((node.lineno, "torch.load() without weights_only=True"))
        found += [(node.lineno, f"{k}={v}") for k, v in BANNED_KEYWORDS.items() if k in keywords and keywords[k] is v]
    return [f"{module.path}:{line}: {what}" for line, what in found]


def graph(modules: Iterable[Source]) -> dict[str, set[str]]:
    """Module -> modules it imports, by the longest name that is a module."""
    names = {module.name for module in modules}
    edges: dict[str, set[str]] = {}
    for module in modules:
        reached = edges.setdefault(module.name, set())
        for _, name in imports(module):
            while name and name not in names:
                name = name.rpartition(".")[0]
            if name and name != module.name:
                reached.add(name)
    return edges


@pytest.mark.parametrize("rule", [breaches, distributed, unsafe], ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule):
    found = [breach for module in sources() for breach in rule(module)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (breaches, "multiway.nn.x", "from multiway.config import load"),
        (breaches, "multiway.systems.x", "def f():\n    from ..engine import train"),
        (breaches, "multiway.systems.x", "from .. import engine"),
        (breaches, "multiway.data.x", "import multiway.backbones.vit"),
        (breaches, "multiway.tasks.x", "import importlib\nimportlib.import_module('multiway.cli')"),
        (breaches, "multiway.helpers", ""),
        (distributed, "multiway.objectives.x", "import torch\ntorch.distributed.all_reduce(1)"),
        (distributed, "multiway.nn.x", "from torch import distributed"),
        (unsafe, "multiway.weights.x", "import torch\ntorch.load('x')"),
        (unsafe, "multiway.weights.x", "from pickle import loads"),
        (unsafe, "multiway.data.x", "archive.extractall()"),
        (unsafe, "multiway.cli", "import subprocess\nsubprocess.run('x', shell=True)"),
    ],
)
def test_the_rule_finds_a_planted_breach(rule, name, text):
    assert rule(parse(name, text, Path("planted.py")))


def test_no_import_cycles():
    try:
        TopologicalSorter(graph(sources())).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


LIGHT = ("multiway", *(f"multiway.{name}" for name in ("cli", "commands", "config", "run", "recipes")))


@pytest.mark.parametrize("name", LIGHT)
def test_importing_it_does_not_import_torch(name):
    """The command line answers at once, and settings can be read where torch is slow to load."""
    if name not in {module.name for module in sources()}:
        pytest.skip(f"{name} is not there yet")
    code = f"import {name}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
