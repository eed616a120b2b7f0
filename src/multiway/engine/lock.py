"""One process per run directory, and no worker that outlives its launcher."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from typing import IO

from multiway.errors import LockedError, WriteError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RunLock:
    """Hold a run directory for this process: ``with RunLock(folder): ...``.

    The lock is the kernel's (flock) and ends with the process however it dies; ``folder/.lock`` only tells others who
    holds it: host, pid, boot id, command and start (UTC). The folder is made if it is not there. Forked children
    (loader workers) do not share the lock. Where several processes run together, rank 0 takes it for all.

    Raises LockedError (exit 77) naming the holder, WriteError (73) when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._file: IO[str] | None = None
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> RunLock:
        path = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")
        except OSError as error:
            raise WriteError(f"{path}: cannot lock the run directory: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            time.sleep(0.1)  # a holder that has just got the lock is still writing who it is
            raise LockedError(
                f"{self.folder} is in use by {_describe(path)}; wait for it, stop it, or choose another directory"
            ) from None
        file.truncate(0)
        json.dump(_holder(), file)
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()  # closing, unlike unlocking, leaves the lock with whoever else has it open
            self._file = None


def die_with_parent() -> None:
    """Have the kernel kill this process (SIGKILL) as soon as the one that started it is gone; Linux only.

    For the worker ranks of a launcher: without it they live on and write beside the restarted job. Not for a process
    started from a shell, which may rightly outlive it.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _holder() -> dict[str, str | int]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "command": shlex.join(sys.argv),
        "start": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return "process {pid} on {host} (boot {boot}), started {start}: {command}".format_map(holder)
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process ({path} does not say which)"
