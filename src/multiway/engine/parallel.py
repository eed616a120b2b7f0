"""Processes: who we are, what crosses between us, and how an objective is spread over us.

The only launcher is ``torchrun``; one process is the same code with nothing to exchange. Control (counts, flags) goes
over gloo on the CPU, so it never waits for the device.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from multiway.engine.heap import keep_freed_memory
from multiway.engine.lock import die_with_parent
from multiway.engine.optim import keep_gradients
from multiway.errors import DataError, MultiwayError
from multiway.run import Parallel
from multiway.types import Across, Objective

T = TypeVar("T")

TIMEOUT_SECONDS = 300.0
"""How long a rank waits for another before it ends with the collective's error; ``MULTIWAY_TIMEOUT`` overrides it."""

PATIENCE = timedelta(days=1)
"""How long ranks wait for the first to make what is made once: an index, a codebook, stored views."""


class _Gather(torch.autograd.Function):
    """(B, ...) of this rank -> (world * B, ...) of all, rank order; the backward sums every rank's gradient of ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parts = [part.contiguous() for part in grads[0].chunk(dist.get_world_size())]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


@dataclass(frozen=True)
class Process:
    """This process among ``world``; ``control``: the gloo group, None when alone."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over all processes, in double precision."""
        if self.control is None:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self.control)
        return summed.tolist()

    def share(self, value: T) -> list[T]:
        """The values of all processes, rank order; plain values only."""
        everyone: list[Any] = [value] * self.world
        if self.control is not None:
            dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def together(self, work: Callable[[], T]) -> T:
        """``work()`` on every process; an error of ours on any of them is raised on all, so that all end alike."""
        result, failure = None, None
        try:
            result = work()
        except MultiwayError as error:
            failure = error
        if self.total([failure is not None])[0]:
            told = [each for each in self.share(failure and (type(failure), str(failure))) if each]
            kind, message = told[0]
            raise failure or (DataError if issubclass(kind, DataError) else kind)(message)
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """``work()`` on the first process, then on the others, which find on disk what it made; see ``together``."""
        if self.control is None:
            return work()
        patient = dataclasses.replace(self, control=dist.new_group(backend="gloo", timeout=PATIENCE))
        result = patient.together(work if self.rank == 0 else _nothing)
        other = patient.together(_nothing if self.rank == 0 else work)
        dist.destroy_process_group(patient.control)
        return result if self.rank == 0 else other  # type: ignore[return-value]

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def across(self) -> Across:
        """What an objective may use of us."""
        if self.world == 1:
            return Across()

        def total(x: Tensor) -> Tensor:
            x = x.detach().clone()
            dist.all_reduce(x)
            return x

        return Across(gather=_Gather.apply, total=total, rank=self.rank, world=self.world)

    def stop(self) -> None:
        """Leave the group."""
        if self.control is not None:
            dist.destroy_process_group()


def start(threads: int | None) -> Process:
    """Join the processes ``torchrun`` started, or be alone; NCCL with GPUs, gloo without."""
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if world == 1:
        return Process(0, 1, device, None)
    timeout = timedelta(seconds=float(os.environ.get("MULTIWAY_TIMEOUT", TIMEOUT_SECONDS)))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    control: Any = dist.new_group(backend="gloo", timeout=timeout)
    return Process(dist.get_rank(), world, device, control)


def spread(objective: Objective, process: Process, parallel: Parallel) -> None:
    """Place an initialised objective on its device, in place: recompute -> compile -> shard -> root.

    Blocks are the units of compilation and sharding, the objective is the FSDP root (its hooks fire on ``forward``
    only, so evaluations reach the model through ``objective.apply_model``).
    """
    objective.to(process.device)
    encoder: Any = objective.model.encoder  # type: ignore[union-attr]
    for block in encoder.blocks[: parallel.recompute]:
        recompute(block)
    if parallel.compile:
        for block in encoder.blocks:
            block.compile(dynamic=True)
    if process.world == 1:
        if keeps_gradients(process.device, parallel):
            keep_gradients(objective)
        return
    kind = process.device.type
    if parallel.shard == "full":
        mesh = init_device_mesh(kind, (process.world,))
    else:
        mesh = init_device_mesh(kind, (process.world, 1), mesh_dim_names=("replicate", "shard"))
    for block in encoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    register_fsdp_forward_method(objective, "apply_model")


def keeps_gradients(device: torch.device, parallel: Parallel) -> bool:
    """Whether a process alone keeps gradients as they are computed: of one micro-batch, and where we compute them."""
    return device.type == "cpu" and parallel.micro == 1 and not parallel.compile


def recompute(block: nn.Module) -> None:
    """Have a block run again in the backward instead of keeping its activations; compiled, it does so in its graph."""
    forward = block.forward

    def again(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    block.forward = again


def synchronise_gradients(objective: nn.Module, last: bool) -> None:
    """Reduce gradients over processes only with the last micro-batch of a step."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)


def observe(objective: Objective, fn: Callable[[nn.Module], T]) -> T:
    """``fn(model)`` in evaluation mode and without gradients; a sharded model is gathered block by block as it runs."""

    def gathered(model: nn.Module) -> T:
        # FSDP keeps the tensors it first gathers into: made within inference_mode, which fn may use, they cannot train.
        for block in model.modules():
            if isinstance(block, FSDPModule):
                block.unshard()
                block.reshard()
        return fn(model)

    objective.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # nothing is compiled for it alone
            return objective.apply_model(gathered)
    finally:
        objective.train()
        if isinstance(objective, FSDPModule):
            objective.reshard()  # after a forward its root stays gathered, for a backward that does not come here


def _nothing() -> None:
    """What the others do meanwhile."""
