"""The training loop: any objective, any batches, one process or many, resumed exactly.

A run folder holds ``run.json`` (resolved settings), ``metrics.jsonl`` (one line a step), ``eval.jsonl``,
``quarantine/rank-R.jsonl`` (records that could not be loaded), ``checkpoints/step-%09d/`` and, at the end, ``final/``.
The position in the data is the number of the step; nothing random is left to a generator that would have to be saved.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import time
from collections.abc import Callable, Mapping
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
    build_optimizer,
    optimizer_steps,
    optimizer_tensors,
    restore_steps,
    set_rate,
)
from multiway.engine.parallel import Process, spread, start, synchronise_gradients
from multiway.engine.schedule import learning_rate
from multiway.errors import ConfigError, NumericsError, Preempted, ResumeError
from multiway.run import Run
from multiway.types import Across, Batch, Objective, move

MAX_SKIPPED = 3
"""Steps in a row without finite loss and gradient before the run stops (exit 76)."""

FREE = ("parallel", "checkpoint", "log", "data.workers", "data.max_bad")
"""Settings that may change when a run continues; any other change must be named with ``--change``."""


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
    """SIGTERM and SIGINT ask the loop to stop after this step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def train(
    run: Run, build: Callable[[Run], Job], out: Path, *, resume: bool = True, change: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train a run to its last step in ``out``, from its newest checkpoint if there is one; return the last evaluation.

    ``resume``: False refuses a folder that has checkpoints. ``change``: dotted names of settings that may differ from
    those the run was started with. Raises ResumeError (78), LockedError (77), CheckpointError (74), NumericsError (76),
    DataError (65), WriteError (73), and Preempted (75) after a signal, with a checkpoint saved.
    """
    process = start(run.parallel.threads)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if process.rank == 0:
            with RunLock(out):
                return Trainer(run, build(run), out, process).run_all(resume, change)
        return Trainer(run, build(run), out, process).run_all(resume, change)
    finally:
        process.stop()


class Trainer:
    """The state of a run: objective, optimiser, average, and the number of steps done."""

    def __init__(self, run: Run, job: Job, out: Path, process: Process) -> None:
        if run.parallel.micro > 1 and not job.objective.splittable:
            raise ConfigError(
                f"{type(job.objective).__name__} compares all samples of a step with each other: parallel.micro must "
                f"be 1, got {run.parallel.micro}. Take fewer items per step, or more processes"
            )
        self.run, self.job, self.out, self.process = run, job, out, process
        self.objective = job.objective
        spread(self.objective, process, run.parallel)
        self.optimizer = build_optimizer(self.objective, run.optim)
        self.average = Average(self.objective, run.optim.ema)
        self.across: Across = process.across()
        self.done = 0
        self.skipped = 0
        self.window = FaultWindow(run.data.max_bad)
        self.metrics = Lines(out / "metrics.jsonl")
        self.evaluations = Lines(out / "eval.jsonl")
        self.quarantine = Lines(out / "quarantine" / f"rank-{process.rank}.jsonl")
        self.quarantine.path.parent.mkdir(exist_ok=True)

    def run_all(self, resume: bool, change: tuple[str, ...]) -> dict[str, Any]:
        """Resume, run every step left, evaluate and export."""
        run, process = self.run, self.process
        self.restore(resume, change)
        signals = Signals()
        items = sum(stream.items for stream in self.job.batches.streams)
        meter = Meter(run.schedule.steps, self.done, shown=process.rank == 0)
        board = TensorBoard(self.out / "tensorboard") if run.log.tensorboard and process.rank == 0 else None
        batches = iterate(
            self.job.batches,
            range(self.done, run.schedule.steps),
            micros=run.parallel.micro,
            rank=process.rank,
            world=process.world,
            workers=run.data.workers,
            pin=process.device.type == "cuda",
        )
        self.objective.train()
        try:
            while self.done < run.schedule.steps:
                row = self.step([next(batches) for _ in range(run.parallel.micro)], signals.asked)
                stop = row.pop("stop")
                meter.step(self.done, row["loss"], items)
                if process.rank == 0:
                    self.metrics.write([row])
                    if board:
                        board.write(row)
                last = self.done == run.schedule.steps
                if stop or last or self.done % run.checkpoint.every == 0:
                    self.save()
                if stop and not last:
                    raise Preempted(f"stopped by a signal after step {self.done}; the same command continues {self.out}")
                if run.log.evaluate and self.done % run.log.evaluate == 0 and not last:
                    self.evaluate()
        finally:
            meter.close()
        return self.finish()

    def step(self, micros: list[tuple[Batch, list[Fault]]], asked: bool) -> dict[str, Any]:
        """One optimiser step: the sum of all micro-batches of all processes, over global counts."""
        begun = time.perf_counter()
        process, objective = self.process, self.objective
        faults = [fault for _, found in micros for fault in found]
        self.quarantine.write(dict(fault) for fault in faults)
        self.window.add(sum(batch["plan"].samples for batch, _ in micros), faults)

        # Every term is divided by its number of items in the whole step, whoever holds them.
        local = [objective.counts(batch) for batch, _ in micros]
        names = list(local[0])
        totals = process.total([sum(counts[name] for counts in local) for name in names])
        counts = dict(zip(names, totals, strict=True))

        sums: dict[str, float] = {}
        loss = 0.0
        for i, (batch, _) in enumerate(micros):
            synchronise_gradients(objective, i == len(micros) - 1)
            with torch.autocast(process.device.type, torch.bfloat16, enabled=self.run.parallel.precision == "bf16"):
                output = objective(move(batch, process.device), counts, self.across)
            # FSDP takes the mean of gradients over processes; the loss is already a share of a global sum.
            (output.loss * process.world).backward()
            loss += float(output.loss.detach())
            for name, value in output.sums.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        norm = self.clip()

        # All processes agree whether to apply the step and whether to stop after it.
        keys = sorted(sums)
        *values, loss, bad, stop = process.total([*(sums[k] for k in keys), loss, not math.isfinite(norm), asked])
        applied = bad == 0 and math.isfinite(loss)
        lr = learning_rate(self.run.schedule, self.run.optim.lr, self.done)
        set_rate(self.optimizer, lr)
        if applied:
            self.optimizer.step()
            objective.after_step(self.done)
            self.average.update(objective)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.note_skipped(applied, loss, norm, [batch["sample"].tolist() for batch, _ in micros])
        terms = {key: value / max(1.0, counts[key.split("/")[0]]) for key, value in zip(keys, values, strict=True)}
        seconds = round(time.perf_counter() - begun, 4)
        row = {"step": self.done, "loss": loss, **terms, "lr": lr, "grad_norm": norm, "applied": applied}
        return {**row, "seconds": seconds, "stop": stop > 0}

    def clip(self) -> float:
        """Scale gradients to the greatest norm allowed; the norm before, over all processes."""
        limit = self.run.optim.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def note_skipped(self, applied: bool, loss: float, norm: float, samples: list[list[int]]) -> None:
        """Report a step that was not applied, with its records; too many in a row end the run."""
        self.skipped = 0 if applied else self.skipped + 1
        if applied:
            return
        row = {"step": self.done, "loss": str(loss), "grad_norm": str(norm), "samples": samples}
        Lines(self.out / "quarantine" / f"skipped-rank-{self.process.rank}.jsonl").write([row])
        if self.process.rank == 0:
            CONSOLE.print(f"step {self.done} skipped: loss {loss}, gradient norm {norm}; weights are untouched")
        if self.skipped > MAX_SKIPPED:
            raise NumericsError(
                f"{self.skipped} steps in a row had no finite loss and gradient, up to step {self.done}; their records "
                f"are in {self.out / 'quarantine'}. The last checkpoint is from before: lower optim.lr or clip"
            )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint stores, by group and name; live tensors."""
        groups = {
            "model": dict(self.objective.state_dict()),
            "optim": optimizer_tensors(self.objective, self.optimizer),
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
            "optim_steps": optimizer_steps(self.objective, self.optimizer),
            "skipped": self.skipped,
            "bad_records": dict(self.window.counts),
            "environment": environment(self.process),
        }
        checkpoint.save(
            self.out / "checkpoints", self.done, self.tensors(), state, keep=self.run.checkpoint.keep
        )

    def restore(self, resume: bool, change: tuple[str, ...]) -> None:
        """Continue from the newest whole checkpoint, or start afresh if there never was one."""
        note = CONSOLE.print if self.process.rank == 0 else _silent
        found = checkpoint.newest(self.out / "checkpoints", note=note)
        if found is not None:
            if not resume:
                raise ResumeError(f"{self.out} already holds step {found.step}; take another --out, or --resume auto")
            self.check_same(found.state, change)
            restore_steps(self.objective, self.optimizer, found.state["optim_steps"])
            for group, tensors in self.tensors().items():
                found.load(group, tensors)
            self.done, self.skipped = found.step, found.state["skipped"]
            self.window.counts.update(found.state["bad_records"])
            note(f"resumed {self.out} at step {self.done}")
        if self.process.rank == 0:
            config.save(self.run, self.out / "run.json")
            self.metrics.cut(self.done)
            self.evaluations.cut(self.done)
        self.quarantine.cut(self.done)
        self.process.wait()

    def check_same(self, state: Mapping[str, Any], change: tuple[str, ...]) -> None:
        """Refuse to continue under other settings or data than the run was started with."""
        different = config.differences(state["run"], config.plain(self.run))
        refused = {k: v for k, v in different.items() if not k.startswith(FREE) and k not in change}
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
        self.average.swap(self.objective)
        self.objective.eval()
        with torch.no_grad():
            figures = self.objective.apply_model(self.job.evaluate)
        self.objective.train()
        self.average.swap(self.objective)
        if self.process.rank == 0:
            self.evaluations.write([{"step": self.done, **figures}])
        return figures

    def finish(self) -> dict[str, Any]:
        """Evaluate and export the final weights."""
        figures = self.evaluate()
        self.average.swap(self.objective)
        weights = {name: whole(tensor) for name, tensor in self.objective.model.state_dict().items()}
        self.average.swap(self.objective)
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


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows, gathered if it is sharded; every rank must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def _silent(message: str) -> None:
    """Say nothing."""
