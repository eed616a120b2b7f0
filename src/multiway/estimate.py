"""What a run will take, before it is started: parameters, FLOPs, memory, the largest batch, time.

Memory and operations are those of a rehearsed step (`multiway.rehearsal`), time is what a roofline gives them
(`multiway.roofline`). Not counted: loading, evaluation, checkpoints; what libraries keep for themselves.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from multiway.errors import ConfigError
from multiway.rehearsal import Assemble, Stage, Trace, size
from multiway.roofline import NAMED, NETWORK, REPEATS, Clock, Hardware, present, probe
from multiway.run import Run

HERE = "here"
PROBE_SECONDS = 10.0

KINDS = {"image": "images", "pair": "pairs", "text": "texts", "example": "examples"}
"""Kinds of samples, and the setting of ``Run.data`` that says how many are in a step."""

MACHINE = 8
"""Devices in a machine; more of them speak over the network (assumed)."""

MOST = 1024
"""Samples of the largest batch that is rehearsed; beyond, memory goes on growing as it did."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: ``weights``, ``optimizer`` and ``average`` are there throughout; ``gathered``: parameters
    and gradients that are whole for a moment, when processes share them; ``step``: batch, activations and gradients at
    the worst moment."""

    weights: float
    optimizer: float
    average: float
    gathered: float
    step: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.optimizer + self.average + self.gathered + self.step


@dataclass(frozen=True)
class Layout:
    """How a run is spread: ``devices``, and whether each holds a part of parameters and optimiser (``full``) or all
    (``replicate``); ``micro``: micro-batches."""

    devices: int
    shard: str
    micro: int

    def memory(self, stage: Stage, micro: Trace, update: Trace) -> Memory:
        """What a device holds."""
        share = 1 / self.devices if self.shard == "full" else 1.0
        held = {name: share * held for name, held in stage.held().items()}
        # FSDP2 gathers the next block while one runs, and frees the root's parameters and gradients at the end.
        block = max(size(block.parameters()) for block in stage.blocks)
        root = size(stage.objective.parameters()) - sum(size(block.parameters()) for block in stage.blocks)
        gathered = 0 if self.devices == 1 else root + 2 * block
        if self.micro > 1:  # gradients stay whole from one micro-batch to the next
            step, gradient = micro.peak(blocks=0, others=0) + micro.gradient, micro.gradient
        else:
            gathered += 0 if self.devices == 1 else 2 * block
            step, gradient = micro.peak(blocks=share), share * micro.gradient
        return Memory(**held, gathered=gathered, step=max(step, gradient + update.peak()))


def estimate(
    run: Run,
    assemble: Assemble,
    *,
    hardware: str = HERE,
    devices: int = 1,
    memory: float | None = None,
    tokens: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What a run will take on so many devices, as plain values.

    ``assemble``: the recipe's; ``hardware``: a name of `NAMED`, or ``here``, which is measured; ``memory``: bytes of
    each device, None = what it has; ``tokens``: mean length of texts by kind (see `make_samples`). Returns
    ``parameters`` by expert, ``items`` by kind (of a ``step`` over all devices, of a ``micro``-batch of one), ``flops``
    (forward of one item by kind; of a step), ``memory`` in bytes, ``layouts`` (the same for other choices, and the
    largest micro-batch of each), ``time`` in seconds. Raises ConfigError for unknown hardware, no device, and
    micro-batches of what cannot be split.

    Where every step holds one kind of samples (``objective.shares``), memory, layouts and micro-batch are those of the
    kind that needs most, what a step takes is the mean over the kinds, and ``shares`` are their shares of the steps.
    """
    shares = {kind: x for kind, x in getattr(run.objective, "shares", {}).items() if getattr(run.data, KINDS[kind])}
    if len(shares) > 1:
        options: dict[str, Any] = {"hardware": hardware, "devices": devices, "memory": memory, "tokens": tokens}
        return mean({kind: estimate(only(run, kind), assemble, **options) for kind in shares}, shares)
    if hardware != HERE and hardware not in NAMED:
        raise ConfigError(f"unknown hardware {hardware!r}: known are {HERE} (this machine), {', '.join(NAMED)}")
    if devices < 1:
        raise ConfigError(f"a run needs at least one device, got {devices}")
    device = present({"fp32", run.parallel.precision}) if hardware == HERE else NAMED[hardware]
    room = memory or device.memory
    stage = Stage(run, assemble, tokens or {}, devices=devices, gpu=device.queued)
    if run.parallel.micro > stage.joined and not stage.objective.splittable:
        raise ConfigError(
            f"{run.recipe} compares all samples of a step, which it cannot take part by part: parallel.micro must be 1"
        )
    step = {kind: n for kind, name in KINDS.items() if (n := getattr(run.data, name))}
    items = {kind: math.ceil(n / devices / run.parallel.micro) for kind, n in step.items()}
    micro = stage.micro(items, run.parallel.recompute)
    update = stage.update()
    micros = run.parallel.micro // stage.joined  # those that are joined are one trace
    layout = Layout(devices, run.parallel.shard if devices > 1 else "replicate", micros)
    own = layout.memory(stage, micro, update)
    flops = forward_flops(stage, items)
    clock = calibrated(device, stage, items, micro, update) if hardware == HERE else device.seconds
    spent = step_seconds(device, clock, layout, stage, micro, update)
    useful = 3 * sum(flops[kind] * n for kind, n in step.items())
    return {
        "recipe": run.recipe,
        "hardware": device.name,
        "measured": hardware == HERE,
        "devices": devices,
        "precision": run.parallel.precision,
        "parameters": parameters(stage.objective.model),
        "items": {"step": step, "micro": items, "micros": run.parallel.micro},
        "flops": {"forward": flops, "step": useful},
        "memory": {**asdict(own), "total": own.total, "room": room},
        "layouts": layouts(stage, items, micro, update, layout, room),
        "time": {
            **spent,
            "items_per_second": sum(step.values()) / spent["step"],
            "steps": run.schedule.steps,
            "days": run.schedule.steps * spent["step"] / 86400,
            "utilisation": useful / spent["step"] / devices / device.peak[run.parallel.precision],
        },
    }


def only(run: Run, kind: str) -> Run:
    """The run with one kind of samples in all its steps."""
    others = {name: 0 for other, name in KINDS.items() if other != kind}
    return replace(run, data=replace(run.data, **others))


def mean(reports: Mapping[str, dict[str, Any]], shares: Mapping[str, float]) -> dict[str, Any]:
    """What `estimate` returns of a run whose steps hold one kind each, from what it returns of each kind alone."""
    total = sum(shares.values())
    shares = {kind: share / total for kind, share in shares.items()}
    largest = max(reports.values(), key=lambda report: report["memory"]["total"])

    def step(of: Callable[[dict[str, Any]], float]) -> float:
        return sum(share * of(reports[kind]) for kind, share in shares.items())

    time = {name: step(lambda report, name=name: report["time"][name]) for name in largest["time"]}
    count = step(lambda report: sum(report["items"]["step"].values()))
    used = step(lambda report: report["time"]["utilisation"] * report["time"]["step"])
    every = {kind: report["items"]["step"][kind] for kind, report in reports.items()}
    forward = {kind: report["flops"]["forward"][kind] for kind, report in reports.items()}
    return {
        **largest,
        "shares": shares,
        "items": {**largest["items"], "step": every},
        "flops": {"forward": forward, "step": step(lambda report: report["flops"]["step"])},
        "time": {
            **time,
            "items_per_second": count / time["step"],
            "steps": largest["time"]["steps"],
            "utilisation": used / time["step"],
        },
    }


def parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each expert, and of what is outside experts by the module it is in."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        expert = re.search(r"\.experts\.(\w+)\.", name)
        found[f"{expert[1]} expert" if expert else name.split(".")[0]] += parameter.numel()
    return {**found, "total": sum(found.values())}


def forward_flops(stage: Stage, items: Mapping[str, int]) -> dict[str, float]:
    """FLOPs of the forward that one more item of each kind takes."""
    few = {kind: min(n, 32) for kind, n in items.items()}
    before = stage.forward_flops(few)
    return {kind: (stage.forward_flops({**few, kind: 2 * n}) - before) / n for kind, n in few.items()}


# ------------------------------------------------------------------------------------------------------------ memory


def layouts(
    stage: Stage, items: Mapping[str, int], micro: Trace, update: Trace, layout: Layout, room: float
) -> list[dict[str, Any]]:
    """Memory, and the largest micro-batch that fits, with parameters whole or sharded, with and without recomputation.

    What a larger micro-batch takes is interpolated between two that are rehearsed; it grows ever faster if at all, so
    between them the result is rather too small.
    """
    asked, count, rows = stage.run.parallel.recompute, sum(items.values()), []
    for recomputed in sorted({0, asked, len(stage.blocks)}):
        trace = micro if recomputed == asked else stage.micro(items, recomputed)
        grows = trace.peak(blocks=0, others=0)
        factor = (room - layout.memory(stage, trace, update).total + grows) / grows
        more = scaled(items, max(0.0, min(factor, MOST / count)))
        if more == items:
            more = scaled(items, 2.0)
        other = stage.micro(more, recomputed)
        for shard in ("replicate", "full")[: layout.devices]:
            own = replace(layout, shard=shard)
            total, there = (own.memory(stage, x, update).total for x in (trace, other))
            slope = max(1.0, (there - total) / (sum(more.values()) - count))
            largest = scaled(items, max(0.0, 1 + (room - total) / slope / count))
            fits = total <= room or sum(largest.values()) <= count + (room - total) / slope
            rows.append({"shard": shard, "recompute": recomputed, "total": total, "largest": largest if fits else None})
    return rows


def scaled(items: Mapping[str, int], factor: float) -> dict[str, int]:
    """So many times the items, at least one of each kind."""
    return {kind: max(1, math.floor(n * factor)) for kind, n in items.items()}


# -------------------------------------------------------------------------------------------------------------- time


def calibrated(hardware: Hardware, stage: Stage, items: Mapping[str, int], micro: Trace, update: Trace) -> Clock:
    """The present device's clock, by the step's own operations, or where they take too long by a smaller step's."""
    calls = micro.calls + update.calls
    often = PROBE_SECONDS / (REPEATS + 2) / sum(map(hardware.seconds, calls))
    if often < 1:
        calls = stage.micro(scaled(items, often), stage.run.parallel.recompute).calls + update.calls
    return probe(hardware, calls, PROBE_SECONDS)


def step_seconds(
    hardware: Hardware, clock: Clock, layout: Layout, stage: Stage, micro: Trace, update: Trace
) -> dict[str, float]:
    """Seconds of an optimiser ``step``, and of its parts: the ``device``'s, the ``host``'s, ``exchange`` with others.

    A GPU's host runs ahead of it, and exchange is taken to hide behind computation: the longest part decides.
    """
    share = 1 / layout.devices if layout.shard == "full" else 1.0
    device = sum(clock(x) * n for x, n in micro.calls.items()) + hardware.page * micro.peak()
    device = layout.micro * device + share * sum(clock(x) * n for x, n in update.calls.items())
    host = hardware.call * (layout.micro * micro.calls.total() + update.calls.total())
    # Sharded: gathered in every forward and backward, gradients reduced once; whole: gradients summed, there and back.
    times = 2 * layout.micro + 1 if layout.shard == "full" else 2
    sent = times * size(stage.objective.parameters()) * (1 - 1 / layout.devices)
    exchange = sent / (hardware.link if layout.devices <= MACHINE else NETWORK)
    computed = max(device, host) if hardware.queued else device + host
    return {"step": max(computed, exchange), "device": device, "host": host, "exchange": exchange}


# ----------------------------------------------------------------------------------------------------------- printed


def show(report: Mapping[str, Any]) -> None:
    """Print what `estimate` returned."""
    console, items, spent = Console(), report["items"], report["time"]
    rates = "measured" if report["measured"] else "assumed after its data sheet"
    console.print(
        f"{report['recipe']} on {report['devices']} x {report['hardware']}, {report['precision']}; rates {rates}"
    )
    memory = {name: _unit(n, "B") for name, n in report["memory"].items() if n}
    if report["memory"]["total"] > report["memory"]["room"]:
        memory["total"] += ", does not fit"
    table = Table(show_header=False)
    for title, rows in {
        "parameters": {name: f"{n:,}" for name, n in report["parameters"].items()},
        "forward of an item": {kind: _unit(flops, "FLOP") for kind, flops in report["flops"]["forward"].items()},
        "memory of a device": memory,
    }.items():
        table.add_row(title, style="bold")
        for name, value in rows.items():
            table.add_row(f"  {name}", value)
        table.add_section()
    console.print(table)
    table = Table("parameters", "blocks computed again", "memory", f"largest micro-batch: {' + '.join(items['micro'])}")
    for row in report["layouts"]:
        largest = " + ".join(f"{n:,}" for n in row["largest"].values()) if row["largest"] else "does not fit"
        whole = "sharded" if row["shard"] == "full" else "whole"
        table.add_row(whole, str(row["recompute"]), _unit(row["total"], "B"), largest)
    console.print(table)
    between = " or " if "shares" in report else " + "
    console.print(
        f"a step: {_items(items['step'], between)}, {_unit(report['flops']['step'], 'FLOP')}, in {items['micros']} x "
        f"{_items(items['micro'])} a device\n{spent['step']:.3g} s a step (device {spent['device']:.3g}, host "
        f"{spent['host']:.3g}, exchange {spent['exchange']:.3g}): {spent['items_per_second']:,.0f} items/s, "
        f"{100 * spent['utilisation']:.0f} % of the rate of matrix products\n"
        f"{_span(spent['steps'] * spent['step'])} for {spent['steps']:,} steps"
    )


def _items(items: Mapping[str, int], between: str = " + ") -> str:
    return between.join(f"{n:,} {KINDS[kind]}" for kind, n in items.items())


def _unit(value: float, unit: str) -> str:
    power = min(5, int(math.log10(max(value, 1))) // 3)
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"


def _span(seconds: float) -> str:
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds"
