"""The commands README shows exist: every target of make, every subcommand, every option, every recipe."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from tests.house.source import ROOT, sources

BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Words of every command in a page's shell blocks, without comments, prompts and the settings before a command."""
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            found += [words] if words else []
    return found


def multiway(words: list[str]) -> list[str]:
    """What a command passes to ``multiway``, however it is started; [] when it starts something else."""
    if words[0] == "multiway":
        return words[1:]
    if words[0] in ("python", "torchrun", ".venv/bin/python") and "-m" in words:
        after = words[words.index("-m") + 1 :]
        return after[1:] if after[0] == "multiway" else []
    return []


def subcommand(arguments: list[str]) -> tuple[str, ...]:
    """The words that choose the subcommand: ``data index`` is two, every other one."""
    return tuple(arguments[: 2 if arguments[0] == "data" else 1])


def usage(chosen: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The subcommand's help, as a person would ask for it."""
    command = [sys.executable, "-m", "multiway", *chosen, "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


README = commands((ROOT / "README.md").read_text(encoding="utf-8"))
OURS = [arguments for arguments in map(multiway, README) if arguments]
needs_command_line = pytest.mark.skipif(
    "multiway.cli" not in {module.name for module in sources()}, reason="there is no command line yet"
)


def test_make_targets_exist():
    targets = set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    named = {word for words in README if words[0] == "make" for word in words[1:] if "=" not in word}
    assert named <= targets


@needs_command_line
@pytest.mark.parametrize("chosen", sorted({subcommand(arguments) for arguments in OURS}), ids=" ".join)
def test_subcommands_explain_themselves(chosen):
    shown = usage(chosen)
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()) > 3


@needs_command_line
def test_an_unknown_subcommand_is_refused():
    asked = subprocess.run([sys.executable, "-m", "multiway", "trian"], capture_output=True, text=True, timeout=120)
    assert asked.returncode == 2
    assert "trian" in asked.stderr


PAGE = """```bash
A=1 make x  # why
$ torchrun --n 2 -m multiway train a \\
  --b 'c d'
```
```python
multiway no
```
"""


def test_commands_are_read_as_a_shell_would():
    first, second = commands(PAGE)
    assert first == ["make", "x"]
    assert multiway(second) == ["train", "a", "--b", "c d"]
