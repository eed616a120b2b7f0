"""What a run leaves behind while it goes: one JSON line a step, what was skipped, and progress for people."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from multiway.errors import WriteError

CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_SECONDS = 10
"""Without a terminal, progress is a line every so many seconds."""


class Lines:
    """A JSON-lines file: appended, flushed line by line, cut back on resume. Raises WriteError (73)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; numbers that are not finite become null, which JSON has."""
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in rows)
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot write: {error.strerror}. Make room; then the run continues"
            ) from error

    def sync(self) -> None:
        """Have what was written survive a loss of power."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Keep the whole lines of steps up to ``step``: those after it will be written again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step(line) <= step]
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)


def _step(line: str) -> float:
    """The step of a whole line; infinity for one that a kill cut short."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Progress on standard error: a bar on a terminal, else a line now and then; silent on ranks other than 0."""

    def __init__(self, steps: int, done: int, *, shown: bool) -> None:
        self.steps, self.done, self.shown = steps, done, shown
        self.first, self.begun, self.spoken = done, time.monotonic(), time.monotonic()
        self.bar: Progress | None = None
        if shown and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(TextColumn("train"), *columns, TextColumn("{task.fields[note]}"), console=CONSOLE)
            self.task = self.bar.add_task("train", total=steps, completed=done, note="")
            self.bar.start()

    def step(self, done: int, loss: float, items: int) -> None:
        """Tell that ``done`` steps are complete; ``items``: samples per step, for the rate."""
        self.done = done
        if not self.shown:
            return
        now = time.monotonic()
        rate = (done - self.first) / max(1e-9, now - self.begun)
        note = f"loss {loss:.3f}  {rate:.1f} steps/s  {rate * items:.0f} samples/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif now - self.spoken > LINE_SECONDS or done == self.steps:
            self.spoken = now
            left = (self.steps - done) / max(1e-9, rate)
            CONSOLE.print(f"step {done}/{self.steps}  {note}  {left:.0f} s left")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()


class TensorBoard:
    """Event files beside the metrics, from step ``done`` on; without tensorboard, or with no folder, nothing."""

    def __init__(self, folder: Path | None, done: int) -> None:
        self.writer = None
        if folder is None:
            return
        if importlib.util.find_spec("tensorboard") is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            CONSOLE.print(f"no event files: tensorboard does not import ({error})")
            return
        self.writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Every number of a metrics row at its step."""
        if self.writer is None:
            return
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        if self.writer:
            self.writer.close()
