"""One process per run directory; workers that end with their parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from multiway.engine.lock import RunLock
from multiway.errors import LockedError, WriteError

# Takes the lock, says so, holds it until its input closes.
HOLD = """
import sys
from pathlib import Path
from multiway.engine.lock import RunLock
from multiway.errors import LockedError
try:
    with RunLock(Path(sys.argv[1])):
        print("holds", flush=True)
        sys.stdin.read()
except LockedError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def spawn(code: str, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def test_holder_is_named_and_lock_ends_with_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with RunLock(folder):
        holder = json.loads((folder / ".lock").read_text())
        assert holder["pid"] == os.getpid()
        assert set(holder) == {"host", "pid", "boot", "command", "start"}
        with pytest.raises(LockedError) as caught, RunLock(folder):
            pass
        assert caught.value.exit_code == 77
        assert str(folder) in str(caught.value)
        for value in holder.values():
            assert str(value) in str(caught.value)
    with RunLock(folder), RunLock(tmp_path / "runs" / "two"):
        pass


def test_leftover_of_a_dead_holder_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "gone", "command": "' + "x" * 5000 + '"}')
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_holder_that_cannot_be_read_is_still_a_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text("[1")
        with pytest.raises(LockedError, match="another process"), RunLock(tmp_path):
            pass


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"), RunLock(tmp_path / "file" / "run"):
        pass


def test_of_twenty_at_once_one_wins_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    processes = [spawn(HOLD, str(tmp_path)) for _ in range(20)]
    said = {process.pid: process.stdout.readline().strip() for process in processes}
    winners = [process for process in processes if said[process.pid] == "holds"]
    assert len(winners) == 1, said
    for process in processes:
        if process is not winners[0]:
            assert process.wait() == 77
            assert f"process {winners[0].pid} on" in said[process.pid]
    with pytest.raises(LockedError, match=f"process {winners[0].pid} on"), RunLock(tmp_path):
        pass
    winners[0].send_signal(signal.SIGKILL)
    winners[0].wait()
    with RunLock(tmp_path):
        pass
    for process in processes:
        process.stdin.close()
        process.stdout.close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A loader worker that outlives its killed trainer for a moment must not block the restart."""
    code = """
import os, sys, time
from pathlib import Path
from multiway.engine.lock import RunLock
with RunLock(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(600)
"""
    trainer = spawn(code, str(tmp_path))
    worker = int(trainer.stdout.readline())
    try:
        with pytest.raises(LockedError, match=f"process {trainer.pid} on"), RunLock(tmp_path):
            pass
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        os.kill(worker, 0)  # the worker is still there
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("follows", [True, False])
def test_worker_dies_with_its_parent(follows: bool) -> None:
    """Killed, the launcher takes its worker along: the pipe that only the worker still holds closes."""
    worker = f"""
import sys, time
from multiway.engine.lock import die_with_parent
if {follows}:
    die_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {worker!r}])"
    process = spawn(launcher, start_new_session=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        if follows:
            assert process.communicate(timeout=60)[0] == ""
        else:  # what happens without it
            with pytest.raises(subprocess.TimeoutExpired):
                process.communicate(timeout=1)
    finally:
        if not follows:
            os.killpg(process.pid, signal.SIGKILL)
