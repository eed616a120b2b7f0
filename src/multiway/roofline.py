"""How long operations take: the published peaks of named hardware, and the present device by a probe.

An operation takes as long as its FLOPs at the rate of matrix products, or as its bytes at the rate of memory, whichever
is longer. On the present device a probe then runs operations of the very step and corrects that by what it sees.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from multiway.nn.linear import linear
from multiway.rehearsal import Like, Operation, Recorder

MATMUL, ATTENTION, BANDWIDTH = 0.8, 0.48, 0.9
"""Shares of the published peaks that are assumed of a GPU: large products, fused attention, memory traffic."""

KERNEL_SECONDS, CALL_SECONDS = 2.5e-6, 7e-6
"""Assumed of a GPU: the shortest operation, and the host's time to ask for one."""

RESERVED = 0.06
"""Share of a GPU's memory that is left for its context and for gaps between tensors (assumed)."""

NETWORK = 50e9
"""Bytes/s of each device to other machines: 400 Gb/s (assumed)."""

REPEATS = 3
"""How often something is timed, after once to warm up."""

Clock = Callable[[Operation], float]
"""Seconds of an operation."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device, its rates as a program sees them.

    ``matmul``: FLOP/s by precision; ``attention``: the same as a share of that; ``bandwidth``: of its memory, B/s;
    ``memory``: usable bytes; ``link``: B/s to others in its machine, each way; ``kernel``: seconds of the shortest
    operation; ``call``: seconds of the host per operation; ``page``: seconds per byte that is taken anew from the
    system, as a CPU's allocator does in every step; ``queued``: the host runs ahead of the device; ``peak``: FLOP/s by
    precision that utilisation refers to.
    """

    name: str
    matmul: Mapping[str, float]
    attention: float = ATTENTION / MATMUL
    bandwidth: float
    memory: float
    link: float = NETWORK
    kernel: float = KERNEL_SECONDS
    call: float = CALL_SECONDS
    page: float = 0.0
    queued: bool = True
    peak: Mapping[str, float]

    def seconds(self, operation: Operation) -> float:
        """The roofline."""
        rate = self.matmul[operation.precision] * (self.attention if operation.kind == "attention" else 1)
        return max(operation.flops / rate, operation.moved / self.bandwidth, self.kernel)


def published(name: str, bf16: float, fp32: float, bandwidth: float, memory: float, link: float) -> Hardware:
    """A GPU by its data sheet: dense TFLOP/s, TB/s, GB, GB/s each way."""
    peak = {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12}
    return Hardware(
        name=name,
        matmul={precision: MATMUL * rate for precision, rate in peak.items()},
        bandwidth=BANDWIDTH * bandwidth * 1e12,
        memory=(1 - RESERVED) * memory * 1e9,
        link=link * 1e9,
        peak=peak,
    )


# Source: NVIDIA's data sheets. fp32 is without TF32, as torch computes unless told otherwise.
NAMED = {
    "a100-40gb": published("NVIDIA A100 40 GB", 312, 19.5, 1.555, 40, 300),
    "a100": published("NVIDIA A100 80 GB", 312, 19.5, 2.039, 80, 300),
    "h100": published("NVIDIA H100 SXM", 989, 67, 3.35, 80, 450),
    "h200": published("NVIDIA H200 SXM", 989, 67, 4.8, 141, 450),
    "b200": published("NVIDIA B200 SXM", 2250, 75, 7.7, 180, 900),
    "l40s": published("NVIDIA L40S", 362, 91.6, 0.864, 48, 32),
    "rtx4090": published("NVIDIA GeForce RTX 4090", 165, 82.6, 1.008, 24, 32),
}


def present(precisions: Iterable[str]) -> Hardware:
    """The present device, the first GPU or else the CPU, measured in about a second."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    side, numbers = (8192, 2**28) if gpu else (1024, 2**24)
    matmul = {}
    for precision in precisions:
        x = torch.ones(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        matmul[precision] = 2 * side**3 / timed(lambda x=x: linear(x, x), device)
    x = torch.ones(numbers, device=device)
    measured: dict[str, Any] = {"matmul": matmul, "peak": matmul, "call": call_seconds(device)}
    measured["bandwidth"] = 2 * x.nbytes / timed(lambda: x * 2, device)
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        return Hardware(name=properties.name, memory=(1 - RESERVED) * properties.total_memory, **measured)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return Hardware(name=name, memory=memory, kernel=0.0, page=page_seconds(), queued=False, **measured)


def call_seconds(device: torch.device) -> float:
    """Seconds of the host per operation: of modules that compute next to nothing, forward and backward."""
    layers = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(20)]
    model, x = nn.Sequential(*layers).to(device), torch.ones(1, 8, device=device)

    def run() -> None:
        model(x).sum().backward()

    with Recorder() as recorder:
        run()
    return timed(run, device) / recorder.calls.total()


def page_seconds() -> float:
    """Seconds per byte of the first writing to memory, over those of the second."""
    took = []
    for _ in range(REPEATS):
        x = torch.empty(2**24)
        begun = time.perf_counter()
        x.fill_(0)
        between = time.perf_counter()
        x.fill_(0)
        took.append((2 * between - begun - time.perf_counter()) / x.nbytes)
    return max(0.0, statistics.median(took))


def probe(hardware: Hardware, calls: Counter[Operation], seconds: float) -> Clock:
    """The roofline of the present device, corrected by running operations on it, those first that cost most in all.

    What was run takes the time it took; the others take the roofline's, times what was seen for their kind.
    """
    device = torch.device("cuda" if hardware.queued else "cpu")
    until = time.perf_counter() + seconds
    took: dict[Operation, float] = {}
    for operation in sorted(calls, key=lambda x: hardware.seconds(x) * calls[x], reverse=True):
        needed = (REPEATS + 2) * hardware.seconds(operation)
        if time.perf_counter() + needed < until and operation.moved < hardware.memory / 32:
            try:
                took[operation] = replay(operation, device)
            except RuntimeError:  # fake tensors are not right in everything: an operation may refuse what it is given
                continue
    seen, expected = defaultdict(float), defaultdict(float)
    for operation, own in took.items():
        seen[operation.kind] += own * calls[operation]
        expected[operation.kind] += hardware.seconds(operation) * calls[operation]

    def clock(operation: Operation) -> float:
        if operation in took:
            return took[operation]
        kind = operation.kind
        return hardware.seconds(operation) * (seen[kind] / expected[kind] if expected[kind] else 1.0)

    return clock


def replay(operation: Operation, device: torch.device) -> float:
    """Seconds of an operation; every run has tensors of its own, which the last one has not left in the cache."""
    runs = iter([rebuilt(operation, device) for _ in range(REPEATS + 1)])
    return timed(lambda: next(runs)(), device)


def rebuilt(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """An operation on tensors like its own: floats are 0.5, integers 0, flags True."""

    def real(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return device
        if not isinstance(leaf, Like):
            return leaf
        value = 0.5 if leaf.dtype.is_floating_point else leaf.dtype == torch.bool
        places = 1 + sum((n - 1) * step for n, step in zip(leaf.shape, leaf.stride, strict=True))
        return torch.full((max(places, 0),), value, dtype=leaf.dtype, device=device).as_strided(leaf.shape, leaf.stride)

    args, kwargs = pytree.tree_unflatten([real(leaf) for leaf in operation.leaves], operation.spec)
    return lambda: operation.function(*args, **kwargs)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Mean seconds of a call (of a step's many operations, what other work on the machine takes adds up); on a GPU
    between two of its events, so that waiting for it is not counted with every call.
    """
    if device.type == "cuda":
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPEATS):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / REPEATS
    took = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        run()
        took.append(time.perf_counter() - begun)
    return statistics.mean(took[1:])
