"""Processes: who we are, what crosses between us, and how an objective is spread over us.

The only launcher is ``torchrun``; one process is the same code with nothing to exchange. Control (counts, flags) goes
over gloo on the CPU, so it never waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.nn.functional import all_gather

from multiway.run import Parallel
from multiway.types import Across, Objective

TIMEOUT = timedelta(seconds=float(os.environ.get("MULTIWAY_TIMEOUT", "300")))
"""How long a rank waits for another before it gives up (exit with the error of the collective)."""


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

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def across(self) -> Across:
        """What an objective may use of us."""
        if self.world == 1:
            return Across()

        def gather(x: Tensor) -> Tensor:
            return torch.cat(all_gather(x.contiguous()))

        def total(x: Tensor) -> Tensor:
            x = x.detach().clone()
            dist.all_reduce(x)
            return x

        return Across(gather=gather, total=total, rank=self.rank, world=self.world)

    def stop(self) -> None:
        """Leave the group."""
        if self.control is not None:
            dist.destroy_process_group()


def start(threads: int | None) -> Process:
    """Join the processes ``torchrun`` started, or be alone; NCCL with GPUs, gloo without."""
    if threads is not None:
        torch.set_num_threads(threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return Process(0, 1, device, None)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return Process(dist.get_rank(), world, device, control)


def spread(objective: Objective, process: Process, parallel: Parallel) -> None:
    """Place an initialised objective on its device, in place: recompute -> compile -> shard -> root.

    Blocks are the units of compilation and sharding, the objective is the FSDP root (its hooks fire on ``forward``
    only, so evaluations reach the model through ``objective.apply_model``).
    """
    objective.to(process.device)
    encoder = objective.model.encoder
    encoder.recompute = parallel.recompute
    if parallel.compile:
        for block in encoder.blocks:
            block.compile(dynamic=True)
    if process.world == 1:
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


def synchronise_gradients(objective: nn.Module, last: bool) -> None:
    """Reduce gradients over processes only with the last micro-batch of a step."""
    if hasattr(objective, "set_requires_gradient_sync"):
        objective.set_requires_gradient_sync(last)
