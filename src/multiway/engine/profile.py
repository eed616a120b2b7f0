"""A few steps of a run under torch's profiler: a trace of every process, and a summary of where the time went."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from multiway.engine.log import CONSOLE
from multiway.engine.parallel import Process
from multiway.engine.timeline import STEP, Summary, summarise
from multiway.errors import WriteError
from multiway.run import Run
from multiway.weights.io import write

WAIT, STEPS = 3, 5
"""Steps that pass before those that count, and the number of these. The last that passes warms the profiler up."""

Page = Callable[[Path, Summary], None]
"""Writes the page of a summary, ``summary.html``, into a folder."""


class Profile:
    """Records a few steps of a run, on every process; the first tells what it found.

    ``folder``: gets a trace of each process and ``summary.json``. ``page``: called with folder and summary; None =
    nothing is recorded. ``done``: steps already made.
    """

    def __init__(self, folder: Path, page: Page | None, run: Run, process: Process, done: int) -> None:
        self.folder, self.page, self.run, self.process, self.done = folder, page, run, process, done
        left = run.schedule.steps - done
        count = min(STEPS, left)
        self.first = done + 1 + min(WAIT, left - count)
        self.last = self.first + count - 1
        self.begin = max(done + 1, self.first - 1)
        self.before: float | None = None
        self.profiler: profile | None = None
        if page is not None and not left and process.rank == 0:
            CONSOLE.print(f"nothing to profile: all {done} steps are done")

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around every step."""
        if self.page is None or self.done >= self.last:
            yield
            return
        begun = time.perf_counter()
        if self.done + 1 == self.begin:
            device = [ProfilerActivity.CUDA] if self.process.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *device])
            self.profiler.start()
        with record_function(f"{STEP}{self.done + 1}"):
            yield
        self.done += 1
        if self.profiler is None:
            self.before = time.perf_counter() - begun
        if self.done == self.last:
            self.close()

    def close(self) -> None:
        """Stop, and write what was recorded: of a run that ends early fewer steps, perhaps none. Raises WriteError."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        if self.done < self.first:
            return
        rank = f"-rank-{self.process.rank}" if self.process.world > 1 else ""
        path = self.folder / f"step-{self.done}{rank}.trace.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = export(profiler, path)
            if self.process.rank == 0:
                self.tell(summarise(trace, range(self.first, self.done + 1), self.facts(path)))
        except OSError as error:
            raise WriteError(f"{path}: cannot write: {error}. Make room, or train without --profile") from error
        except (ValueError, LookupError, RuntimeError, StopIteration) as error:  # a trace that is not as expected
            CONSOLE.print(f"no summary of {path}: {error!r}; training goes on")

    def facts(self, trace: Path) -> dict[str, Any]:
        """What ran; ``before``: seconds of the last step that was not recorded, None when there was none."""
        run, process = self.run, self.process
        name = torch.cuda.get_device_name() if process.device.type == "cuda" else "CPU"
        return {
            "recipe": run.recipe,
            "items": run.data.images + run.data.texts + run.data.pairs,
            "device": name,
            "processes": process.world,
            "threads": torch.get_num_threads(),
            "workers": run.data.workers,
            "precision": run.parallel.precision,
            "compile": run.parallel.compile,
            "recompute": run.parallel.recompute,
            "micro": run.parallel.micro,
            "torch": torch.__version__,
            "before": self.before,
            "trace": trace.name,
        }

    def tell(self, found: Summary) -> None:
        """Write and print a summary."""
        text = json.dumps(asdict(found), indent=2) + "\n"
        write(self.folder / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))
        assert self.page is not None
        self.page(self.folder, found)
        mean = sum(step["seconds"] for step in found.steps) / len(found.steps)
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.shares.items() if share > 0)
        CONSOLE.print(f"profile of steps {self.first} to {self.done}, {1000 * mean:.1f} ms each: {shares}")
        CONSOLE.print(f"profile in {self.folder}: summary.html, summary.json, {found.facts['trace']} (ui.perfetto.dev)")


def export(profiler: profile, path: Path) -> dict[str, Any]:
    """Write a trace in Chrome's format, gzipped, whole or not at all; return its content."""
    plain = path.with_name(f".tmp-{path.stem}")
    try:
        profiler.export_chrome_trace(str(plain))
        content = plain.read_bytes()
    finally:
        plain.unlink(missing_ok=True)
    write(path, lambda temporary: temporary.write_bytes(gzip.compress(content, 6)))
    return json.loads(content)
