"""The time line of recorded steps: every instant put down to one cause.

Shares are of wall time and sum to one: they are claimed from the time line, not added up from durations, which may
overlap. On a CPU an instant belongs to the innermost operator of the main thread (its self time). On a GPU it belongs
to the kernel that runs; of several to the first in the order of `SHARES`, so that an exchange hidden behind a product
costs nothing; where the device idles, to waiting for data or for others, else to the host.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

SHARES: tuple[str, ...] = (
    "gemm", "attention", "elementwise", "optimiser", "copies", "collectives", "data", "host", "between",
)  # fmt: skip
"""Causes: matrix products; attention; arithmetic element by element, norms, sums; clipping and the update of weights;
moving and filling memory; exchange between processes and waiting for them; waiting for a batch; the host (Python,
dispatch, views, allocation); what lies between steps (rows, checkpoints, evaluations).
"""

TOP = 20
"""Operators listed."""

STEP = "multiway step "
"""Begin of the name of a step's range; its number follows."""

EXCHANGE = "gloo:"
"""Begin of the names of exchanges that go on in other threads."""

WITHIN = {"attention", "optimiser", "collectives", "data"}
"""Causes of everything that is called within their operators."""

OPERATORS = (
    ("data", r"enumerate\(DataLoader\)"),
    ("optimiser", r"Optimizer\.|aten::_(foreach|fused_adam)"),
    ("collectives", r"c10d|_c10d|nccl:|(fsdp|FSDP)::|record_param_comms"),
    ("host", r"(autograd|torch|profiler)::"),
    # Batched products and softmax are attention where it is not one operator; losses use log_softmax.
    (
        "attention",
        r"\w+::_?(scaled_dot_product|flash_|efficient_|cudnn_att|fused_sdp|flex_|(safe_)?softmax|(badd)?bmm$)",
    ),
    ("gemm", r"\w+::\w*?(mm|addmm_\w+|matmul|linear|mv|dot|einsum|conv\w*)(_backward)?$|mkldnn"),
    (
        "copies",
        r"\w+::_?(to|to_copy|copy|clone|contiguous|cat|stack|index\w*|gather\w*|scatter\w*|embedding\w*|take\w*|repeat\w*"
        r"|roll|flip|fill|zero|zeros\w*|ones\w*|full\w*|new_(zeros|ones|full)|arange|constant_pad_nd|nonzero|masked_select"
        r"|split_with_sizes_copy|pin_memory|(slice|select|split|unfold)_backward)_?$",
    ),
    (
        "host",
        r"\w+::_?(unsafe_view|view\w*|reshape\w*|expand\w*|split\w*|chunk|as_strided|t|transpose|permute|(new_)?empty\w*"
        r"|unsqueeze|squeeze|slice|select|narrow|unbind|detach|alias|flatten|unflatten|resize|set|item|is_\w+"
        r"|local_scalar_dense|lift_fresh|broadcast_to|movedim|numpy_T|unfold|resolve_\w+|result_type)_?$",
    ),
    ("elementwise", r"\w+::|## Call CompiledFxGraph"),  # the latter: loops that the compiler has fused
    ("host", ""),
)
"""Cause of an operator or range: that of the first pattern its name begins with."""

KERNELS = (
    ("collectives", r"(?i).*nccl"),
    ("attention", r"(?i).*(flash|fmha|attention|softmax)"),
    ("gemm", r"(?i).*(gemm|gemv|nvjet|cutlass|xmma|triton_tem|convol|conv[123]d)"),
    ("optimiser", r"(?i).*(adam|multi_tensor_apply)"),
    ("copies", r"(?i).*(memcpy|memset|copy|cat_|catarray|index|gather|scatter|embedding|fill)"),
    ("elementwise", ""),
)
"""The same of a kernel, where its operator is unknown or a mere range (CUDA graphs, compiled code)."""

Span = tuple[float, float]
"""Begin and end, microseconds of the trace's clock."""


@dataclass(frozen=True)
class Operator:
    """Self seconds and calls of one operator in all profiled steps; on a GPU those of its kernels."""

    name: str
    share: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Summary:
    """What a profile found.

    ``steps``: number, wall seconds and shares of each; ``seconds``: from the first's begin to the last's end;
    ``shares``: of these seconds by cause, all of `SHARES`, summing to 1; ``operators``: the `TOP`; ``device``: ``cuda``
    when kernels were recorded, else ``cpu``; ``facts``: what ran.
    """

    steps: list[dict[str, Any]]
    seconds: float
    shares: dict[str, float]
    operators: list[Operator]
    device: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Op:
    """An operator or range of a thread, or a kernel: its cause, and the spans in which nothing called by it runs."""

    name: str
    share: str
    id: Any
    begin: float
    end: float
    own: list[Span] = field(default_factory=list)


def summarise(trace: Mapping[str, Any], numbers: Iterable[int], facts: dict[str, Any] | None = None) -> Summary:
    """What some steps spent their time on. ``trace``: in Chrome's format; ``numbers``: of the steps, all in it."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    kernels: list[Mapping[str, Any]] = []
    exchanges: list[Span] = []
    for event in trace["traceEvents"]:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(event)
        elif kind in ("cpu_op", "user_annotation") and name.startswith(EXCHANGE):
            exchanges.append(span(event))
        elif kind in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    wanted = {f"{STEP}{number}": number for number in numbers}
    ops = {tid: nest(events) for tid, events in threads.items()}
    main = next(own for own in ops.values() if any(op.name in wanted for op in own))
    steps = {wanted[op.name]: (op.begin, op.end) for op in main if op.name in wanted}

    ran = on_device(kernels, ops) if kernels else main
    busy: dict[str, list[Span]] = {share: [] for share in SHARES}
    for op in ran:
        busy[op.share] += op.own
    # What is waited for where nothing computes, whether or not `ran` has it already.
    busy["collectives"] += exchanges
    busy["data"] += [piece for op in main if op.share == "data" for piece in op.own]
    layers = {share: merge(busy[share]) for share in SHARES[: SHARES.index("host")]}

    found = [{"step": number, **divide(piece, layers)} for number, piece in steps.items()]
    spans = list(steps.values())
    seconds = (spans[-1][1] - spans[0][0]) / 1e6
    shares = {share: sum(step["seconds"] * step["shares"][share] for step in found) / seconds for share in SHARES}
    shares["between"] = 1 - sum(step["seconds"] for step in found) / seconds
    return Summary(found, seconds, shares, longest(ran, spans), "cuda" if kernels else "cpu", facts or {})


@cache
def cause(name: str, patterns: tuple[tuple[str, str], ...] = OPERATORS) -> str:
    """Cause of an operator, or with `KERNELS` of a kernel, by its name."""
    return next(share for share, pattern in patterns if re.match(pattern, name))


def span(event: Mapping[str, Any]) -> Span:
    """Begin and end of an event."""
    return event["ts"], event["ts"] + event["dur"]


def nest(events: list[Mapping[str, Any]]) -> list[Op]:
    """Operators and ranges of one thread in the order of their begins; what loads a batch is left out of its range."""
    ops: list[Op] = []
    open_ops: list[Op] = []  # each within the one before
    cursors: list[float] = []  # up to where the own spans of each are known

    def close(now: float) -> None:
        while open_ops and open_ops[-1].end <= now:
            op, cursor = open_ops.pop(), cursors.pop()
            op.own.append((cursor, op.end))

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        begin, end = span(event)
        close(begin)  # those that ended before
        share = cause(event["name"])
        if open_ops:
            outer = open_ops[-1]
            if outer.share == "data":
                continue
            share = outer.share if outer.share in WITHIN else share
            end = min(end, outer.end)
            outer.own.append((cursors[-1], begin))
            cursors[-1] = end
        op = Op(event["name"], share, event.get("args", {}).get("External id"), begin, end)
        ops.append(op)
        open_ops.append(op)
        cursors.append(begin)
    close(math.inf)
    return ops


def on_device(kernels: list[Mapping[str, Any]], ops: Mapping[Any, list[Op]]) -> list[Op]:
    """Kernels under the names and causes of the operators that launched them, or their own where these say nothing."""
    launched = {op.id: op for own in ops.values() for op in own if op.share not in ("host", "data")}
    ran = []
    for event in kernels:
        op = launched.get(event.get("args", {}).get("External id", math.nan))
        name, share = (op.name, op.share) if op else (event["name"], cause(event["name"], KERNELS))
        ran.append(Op(name, share, None, *span(event), own=[span(event)]))
    return ran


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same instants as ascending spans that do not touch."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif begin < end:
            merged.append((begin, end))
    return merged


def claim(free: list[Span], busy: list[Span]) -> tuple[float, list[Span]]:
    """How much of the free spans is busy, and what is left free; both ascending and disjoint."""
    taken, left, first = 0.0, [], 0
    for begin, end in free:
        while first < len(busy) and busy[first][1] <= begin:
            first += 1
        for i in range(first, len(busy)):
            if busy[i][0] >= end:
                break
            left.append((begin, max(begin, busy[i][0])))
            taken += min(end, busy[i][1]) - left[-1][1]
            begin = min(end, busy[i][1])
        left.append((begin, end))
    return taken, [(begin, end) for begin, end in left if begin < end]


def divide(step: Span, layers: Mapping[str, list[Span]]) -> dict[str, Any]:
    """Seconds of a step and its shares: each layer claims what those before it left, and the host the rest."""
    begin, end = step
    free, shares = [step], dict.fromkeys(SHARES, 0.0)
    for share, busy in layers.items():
        taken, free = claim(free, busy)
        shares[share] = taken / (end - begin)
    shares["host"] = sum(b - a for a, b in free) / (end - begin)
    return {"seconds": (end - begin) / 1e6, "shares": shares}


def longest(ran: Iterable[Op], steps: list[Span]) -> list[Operator]:
    """The operators with most self time within steps."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for op in ran:
        if not op.name.startswith(STEP) and any(begin <= op.begin < end for begin, end in steps):
            name = re.sub(r" (\(|f\w{50}).*", "", op.name)  # without FSDP's module, without the hash of compiled code
            times[name, op.share].append(sum(end - begin for begin, end in op.own) / 1e6)
    rows = [Operator(name, share, sum(own), len(own)) for (name, share), own in times.items()]
    return sorted(rows, key=lambda row: -row.seconds)[:TOP]
