"""The training loop: any objective, any batches, one process or many, resumed exactly.

A run folder holds ``run.json`` (resolved settings), ``metrics.jsonl`` (one line a step), ``eval.jsonl``,
``quarantine/`` (``rank-R.jsonl``: records that could not be loaded, ``skipped-steps.jsonl``: steps whose loss or
gradient was not finite), ``checkpoints/step-%09d/`` and, at the end, ``final/``. The position in the data is the
number of the step; nothing random is left to a generator that would have to be saved.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multiway import config
from multiway.data.loader import Batches, Fault, FaultWindow, iterate
from multiway.engine import checkpoint
from multiway.engine.lock import RunLock
from multiway.engine.log import CONSOLE, Lines, Meter, TensorBoard
from multiway.engine.optim import (
    Average,
    build_optimizers,
    optimizer_steps,
    optimizer_tensors,
    restore_steps,
    total_norm,
    update,
    whole,
)
from multiway.engine.parallel import Process, observe, spread, start, synchronise_gradients
from multiway.engine.profile import Page, Profile
from multiway.engine.schedule import learning_rate
from multiway.errors import ConfigError, NumericsError, Preempted, ResumeError
from multiway.run import Run
from multiway.types import Batch, Objective, move

MAX_SKIPPED = 3
"""Steps in a row without finite loss and gradient that a run survives; one more ends it (exit 76)."""

FREE = ("parallel", "checkpoint", "log", "data.workers", "data.max_bad")
"""Settings that may change when a run continues; any other change must be named with ``--change``."""

Loaded = Iterator[tuple[Batch, list[Fault]]]


@dataclass(frozen=True)
class Job:
    """What a recipe builds from a run for the loop.

    ``objective``: initialised; ``batches``; ``data_hash``: of everything the batches read; ``export(weights,
    folder)``: write the model's whole state dict as users load it; ``evaluate(model)``: figures by task, or None.
    """

    objective: Objective
    batches: Batches
    data_hash: str
    export: Callable[[Mapping[str, Tensor], Path], None]
    evaluate: Callable[[nn.Module], dict[str, Any]] | None = None


class Signals:
    """While open: SIGTERM and SIGINT end the process with exit 75, in a loop after its step, the second one at once."""

    def __init__(self) -> None:
        self.looping = self.asked = False

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        if not self.looping:
            sys.exit(Preempted.exit_code)


def train(
    run: Run,
    build: Callable[[Run], Job],
    out: Path,
    *,
    resume: bool = True,
    change: tuple[str, ...] = (),
    profile: Page | None = None,
) -> dict[str, Any]:
    """Train a run to its last step in ``out``, from its newest checkpoint if there is one; return the last evaluation.

    ``build``: called by the first process before the others. ``resume``: False refuses a folder that has checkpoints.
    ``change``: dotted names of settings that may differ from those the run was started with, ``data`` for the data's
    content. ``profile``: record a few steps in ``out/profile``, and have this write the page; nothing else changes.
    Raises ResumeError (78), LockedError (77), CheckpointError (74), NumericsError (76), DataError (65), WriteError
    (73), and Preempted (75) after a signal, with a checkpoint saved.
    """
    process = start(run.parallel.threads)
    try:
        with Signals() as signals, ExitStack() as held:

            def prepare() -> Job:
                if process.rank == 0:
                    held.enter_context(RunLock(out))
                return build(run)

            return Trainer(run, process.in_turn(prepare), out, process, signals).run_all(resume, change, profile)
    finally:
        process.stop()


class Trainer:
    """The state of a run: objective, optimiser, average, and the number of steps done."""

    def __init__(self, run: Run, job: Job, out: Path, process: Process, signals: Signals) -> None:
        if run.parallel.micro > 1 and not (job.objective.splittable or job.objective.joins):
            raise ConfigError(
                f"{type(job.objective).__name__} compares all samples of a step with each other: parallel.micro must "
                f"be 1, got {run.parallel.micro}. Take fewer items per step, or more processes"
            )
        self.run, self.job, self.out, self.process, self.signals = run, job, out, process, signals
        self.objective = job.objective
        spread(self.objective, process, run.parallel)
        self.optimizers = build_optimizers(self.objective, run.optim, run.parallel.precision)
        self.average = Average(self.objective, run.optim.ema)
        self.across = process.across()
        self.done = 0
        self.skipped = 0
        self.window = FaultWindow(run.data.max_bad)
        self.metrics = Lines(out / "metrics.jsonl")
        self.evaluations = Lines(out / "eval.jsonl")
        self.quarantine = Lines(out / "quarantine" / f"rank-{process.rank}.jsonl")
        self.skips = Lines(out / "quarantine" / "skipped-steps.jsonl")

    def run_all(self, resume: bool, change: tuple[str, ...], page: Page | None = None) -> dict[str, Any]:
        """Resume, run every step left, evaluate and export."""
        run, process = self.run, self.process
        self.restore(resume, change)
        loaded = iterate(
            self.job.batches,
            range(self.done, run.schedule.steps),
            micros=run.parallel.micro,
            rank=process.rank,
            world=process.world,
            workers=run.data.workers,
            pin=process.device.type == "cuda",
        )
        first = process.rank == 0
        meter = Meter(run.schedule.steps, self.done, shown=first)
        board = TensorBoard(self.out / "tensorboard" if run.log.tensorboard and first else None, self.done)
        profile = Profile(self.out / "profile", page, run, process, self.done)
        self.objective.train()
        with closing(loaded), closing(meter), closing(board), closing(profile):  # type: ignore[type-var]
            self.signals.looping = True
            while self.done < run.schedule.steps:
                if run.log.evaluate and self.done and self.done % run.log.evaluate == 0:
                    self.evaluate()
                with profile.step():
                    row, stop = self.step(loaded)
                if first:
                    self.metrics.write([row])
                    board.write(row)
                    meter.step(self.done, row["loss"], self.job.batches.items(self.done - 1))
                self.check_numerics()
                if stop or self.done == run.schedule.steps or self.done % run.checkpoint.every == 0:
                    self.save()
                if stop and self.done < run.schedule.steps:
                    raise Preempted(
                        f"stopped by a signal after step {self.done}; the same command continues {self.out}"
                    )
        return self.finish()

    def step(self, loaded: Loaded) -> tuple[dict[str, Any], bool]:
        """One optimiser step: the sum of all micro-batches of all processes, over global counts.

        Returns its row of the metrics, and whether any process was asked to stop.
        """
        begun = time.perf_counter()
        process, objective = self.process, self.objective
        micros, counts = self.load(loaded)
        sums: dict[str, Tensor] = {}
        # What compares all samples of a step takes its micro-batches together.
        parts = micros if objective.splittable or len(micros) == 1 else [micros]
        for i, part in enumerate(parts):
            synchronise_gradients(objective, i == len(parts) - 1)
            with torch.autocast(process.device.type, torch.bfloat16, enabled=self.run.parallel.precision == "bf16"):
                output = objective(move(part, process.device), counts, self.across)
            # FSDP takes the mean of gradients over processes; the loss is already a share of a global sum.
            (output.loss * process.world).backward()
            for name, value in {"loss": output.loss.detach(), **output.sums}.items():
                sums[name] = sums[name] + value if name in sums else value
        norm, *local = torch.stack(
            [total_norm(objective).double(), *(value.double() for value in sums.values())]
        ).tolist()

        # All processes agree whether to apply the step and whether to stop after it.
        *totals, bad, stop = process.total([*local, not math.isfinite(norm), self.signals.asked])
        terms = dict(zip(sums, totals, strict=True))
        loss = terms.pop("loss")
        lr = learning_rate(self.run.schedule, self.run.optim.lr, self.done)
        applied = bad == 0 and math.isfinite(loss)
        if applied:
            update(self.optimizers, lr, norm, self.run.optim.clip)
            objective.after_step(self.done)
            self.average.update(objective)
        objective.zero_grad(set_to_none=True)
        self.done += 1
        self.skipped = 0 if applied else self.skipped + 1
        means = {name: x / max(1.0, counts[name.split("/")[0]]) for name, x in terms.items()}
        row = {"step": self.done, "loss": loss, **means, "lr": lr, "grad_norm": norm, "applied": applied}
        return {**row, "seconds": round(time.perf_counter() - begun, 4)}, stop > 0

    def load(self, loaded: Loaded) -> tuple[list[Batch], dict[str, float]]:
        """This process's micro-batches of the next step, and the number of items of every term in the whole step."""
        found = self.process.together(lambda: [next(loaded) for _ in range(self.run.parallel.micro)])
        micros = [batch for batch, _ in found]
        faults = [Fault(**{**fault, "step": self.done + 1}) for _, some in found for fault in some]
        local = [self.objective.counts(batch) for batch in micros]
        names = list(local[0])
        *totals, bad = self.process.total([*(sum(own[name] for own in local) for name in names), len(faults)])
        if bad:
            self.quarantine.write(faults)
            faults = [fault for some in self.process.share(faults) for fault in some]
        self.window.add(self.job.batches.items(self.done), faults)
        return micros, dict(zip(names, totals, strict=True))

    def check_numerics(self) -> None:
        """List the last step with its records if it was skipped; too many in a row end the run."""
        if not self.skipped:
            return
        if self.process.rank == 0:
            streams = {stream.kind: stream for stream in self.job.batches.streams}
            places = self.job.batches.places(self.done - 1)
            records = {kind: [streams[kind].sources[p.source].key(p.record) for p in at] for kind, at in places.items()}
            self.skips.write([{"step": self.done, "records": records}])
            CONSOLE.print(f"step {self.done} skipped: loss or gradient is not finite; weights are untouched")
        if self.skipped > MAX_SKIPPED:
            raise NumericsError(
                f"{self.skipped} steps in a row, up to step {self.done}, had no finite loss and gradient; their "
                f"records are in {self.skips.path}. The weights are those of before: lower optim.lr or optim.clip"
            )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint stores, by group and name; live tensors."""
        groups = {
            "model": dict(self.objective.state_dict()),
            "optim": optimizer_tensors(self.objective, self.optimizers),
        }
        if self.run.optim.ema:
            groups["ema"] = self.average.tensors
        return groups

    def save(self) -> None:
        """Write the checkpoint of the present step."""
        state = {
            "step": self.done,
            "run": config.plain(self.run),
            "data_hash": self.job.data_hash,
            "optim_steps": optimizer_steps(self.objective, self.optimizers),
            "skipped": self.skipped,
            "bad_records": dict(self.window.counts),
            "environment": environment(self.process),
        }
        for lines in (self.metrics, self.evaluations, self.quarantine, self.skips):
            lines.sync()
        checkpoint.save(self.out / "checkpoints", self.done, self.tensors(), state, keep=self.run.checkpoint.keep)

    def restore(self, resume: bool, change: tuple[str, ...]) -> None:
        """Continue from the newest whole checkpoint, or start afresh if there never was one."""
        first = self.process.rank == 0
        note = CONSOLE.print if first else _silent
        found = checkpoint.newest(self.out / "checkpoints", note=note)
        if found is not None:
            if not resume:
                raise ResumeError(f"{self.out} already holds step {found.step}; take another --out, or --resume auto")
            self.check_same(found.state, change)
            restore_steps(self.objective, self.optimizers, found.state["optim_steps"])
            for group, tensors in self.tensors().items():
                found.load(group, tensors)
            self.done, self.skipped = found.step, found.state["skipped"]
            self.window.counts.update(found.state["bad_records"])
            note(f"resumed {self.out} at step {self.done}")
        if first:
            config.save(self.run, self.out / "run.json")
            (self.out / "quarantine").mkdir(exist_ok=True)
            for path in (self.metrics.path, self.evaluations.path, *(self.out / "quarantine").glob("*.jsonl")):
                Lines(path).cut(self.done)
        self.process.wait()

    def check_same(self, state: Mapping[str, Any], change: tuple[str, ...]) -> None:
        """Refuse to continue under other settings or data than the run was started with."""
        different = config.differences(config.completed(state["run"], self.run), config.plain(self.run))
        refused = {k: v for k, v in different.items() if not _free(k) and k not in change}
        if refused:
            table = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, (old, new) in refused.items())
            raise ResumeError(
                f"{self.out} was started with other settings:\n{table}\nStart in another folder, take the old values, "
                f"or allow these with --change {','.join(refused)}"
            )
        if state["data_hash"] != self.job.data_hash and "data" not in change:
            raise ResumeError(
                f"the data of {self.out} changed: hash {state['data_hash'][:12]} when it was started, now "
                f"{self.job.data_hash[:12]}. Restore the data, or allow it with --change data"
            )
        now = environment(self.process)
        other = {k: (v, now.get(k)) for k, v in state["environment"].items() if now.get(k) != v}
        if other and self.process.rank == 0:
            told = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in other.items())
            CONSOLE.print(f"the environment changed, so the run is continued exactly but not bit by bit: {told}")

    def evaluate(self) -> dict[str, Any]:
        """Figures of the present (averaged, if kept) weights; on every rank, written by the first."""
        if self.job.evaluate is None:
            return {}
        with self.average.applied(self.objective):
            figures = observe(self.objective, self.job.evaluate)
        if self.process.rank == 0:
            self.evaluations.cut(self.done - 1)  # after a kill the same step is evaluated again
            self.evaluations.write([{"step": self.done, **figures}])
        return figures

    def finish(self) -> dict[str, Any]:
        """Evaluate and export the final weights."""
        figures = self.evaluate()
        with self.average.applied(self.objective):
            weights = {name: whole(tensor) for name, tensor in self.objective.model.state_dict().items()}
            if self.process.rank == 0:
                self.job.export(weights, self.out / "final")
        self.process.wait()
        return figures


def environment(process: Process) -> dict[str, Any]:
    """What bit-identity depends on besides the run."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if process.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "processes": process.world,
    }


def _free(name: str) -> bool:
    """Whether a setting, or the part it belongs to, may change."""
    return any(f"{name}.".startswith(f"{free}.") for free in FREE)


def _silent(message: str) -> None:
    """Say nothing."""
