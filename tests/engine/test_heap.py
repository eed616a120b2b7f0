"""What freed memory costs is paid once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are settings of glibc")

COUNT = """
import ctypes, resource, sys
from multiway.engine.heap import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory(), end=" ")
libc, size, faults = ctypes.CDLL(None), 40 << 20, []
libc.malloc.restype = ctypes.c_void_p
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


def run(how: str, **environment: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env |= {"PYTHONPATH": str(ROOT / "src"), **environment}
    done = subprocess.run([sys.executable, "-c", COUNT, how], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def test_pages_of_freed_blocks_are_used_again() -> None:
    new = min(map(int, run("as it is")))  # faults a block, fewer with huge pages
    told, first, *later = run("kept")
    assert told == "True"
    assert int(first) >= new // 2
    assert all(int(count) <= new // 10 for count in later)


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_has_the_last_word(name: str) -> None:
    value = {"MALLOC_ARENA_MAX": "4", "GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}[name]
    assert run("kept", **{name: value})[0] == "False"
