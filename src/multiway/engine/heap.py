"""What the C library does with the memory that tensors free."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of settings in glibc's ``malloc.h``."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the tensors to come, for the rest of this process; whether it does.

    By default it gives the pages of large tensors back to the system at once, which must zero new ones for the next:
    4 to 10 % of a training step on a CPU, 15 % of a forward pass (docs/speed.md). Nothing is done where the
    environment has settings of its own (``MALLOC_...``, ``GLIBC_TUNABLES``) or another C library is in charge.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
