"""AdamW, and Muon for the matrices of blocks, over named parameter groups; and the running average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from multiway.run import Optim

MOMENTUM, NEWTON_SCHULZ = 0.95, (3.4445, -4.775, 2.0315)
"""Muon's momentum (Nesterov's), and the coefficients of the quintic that it applies five times."""

MATCH_ADAMW = 0.2
"""Root mean square of an update, as AdamW's usually is, so that both take the same rate (Moonlight, section 2.2)."""


TOGETHER = 2**26
"""Most elements of matrices that are orthogonalised at once: all of a small model's, a few of a large one's."""

PART = 2**21
"""Least elements of parameters whose gradients are cast together: few enough to stay in the processor's cache."""

SMALL = 2**16
"""Gradients of so many elements or fewer are cast for their norm."""


def keep_gradients(objective: nn.Module) -> None:
    """Have gradients stay in the dtype they are computed in, until `AdamW` or `Muon` cast them, a few at a time.

    Products in bf16 have bf16 gradients: fp32 copies hold nothing more, and take twice the memory. For one backward a
    step, since what a second one adds would be rounded; within one, gradients of a weight that is used several times
    are added in bf16, as those of autocast's own cached copies are.
    """
    for parameter in objective.parameters():
        parameter.grad_dtype = None  # type: ignore[attr-defined]


class AdamW(torch.optim.AdamW):
    """torch's, fused, for gradients of any dtype; the ``factor`` of a group scales them first (see `update`).

    Those in another dtype than their parameters' are cast a part at a time, and dropped once they are used.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: Optim) -> None:
        super().__init__(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        for group in self.param_groups:
            group["factor"] = 1.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        groups = self.param_groups
        try:
            for group in groups:
                found = [p for p in group["params"] if p.grad is not None]
                self.move([p for p in found if p.grad.dtype == p.dtype], group)
                for part in parts([p for p in found if p.grad.dtype != p.dtype]):
                    for p in part:
                        p.grad = p.grad.to(p.dtype)  # type: ignore[union-attr]
                    self.move(part, group)
                    for p in part:
                        p.grad = None
        finally:
            self.param_groups = groups

    def move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """torch's update of some parameters of a group, whose gradients are in their dtype."""
        if not parameters:
            return
        if group["factor"] != 1:
            torch._foreach_mul_([p.grad for p in parameters], group["factor"])  # type: ignore[arg-type]
        self.param_groups = [{**group, "params": parameters}]
        super().step()


def parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in order, each time until they have `PART` elements or more."""
    part: list[Tensor] = []
    elements = 0
    for p in parameters:
        part.append(p)
        elements += p.numel()
        if elements >= PART:
            yield part
            part, elements = [], 0
    if part:
        yield part


class Muon(Optimizer):
    """Momentum whose every matrix is replaced by the nearest orthogonal one: all directions are learned alike fast.

    Matrices of one shape are orthogonalised together, in ``dtype``; of a sharded matrix the whole is gathered, since
    the result depends on all of it. Decoupled weight decay as AdamW's. torch's own Muon takes one matrix at a time
    (twice as long for a narrow model on CPU). Source: Jordan et al. 2024, "Muon"; rate as in Moonlight (Liu et al.
    2025).
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "scale": 1.0, "factor": 1.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                together = max(1, TOGETHER // shape.numel())
                for first in range(0, len(matrices), together):
                    self.update(matrices[first : first + together], group)

    def update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Move matrices of one shape."""
        rate = group["lr"] * MATCH_ADAMW * max(matrices[0].shape) ** 0.5
        momenta = torch.stack([self.momentum(p, group["factor"]) for p in matrices])
        for p, update in zip(matrices, orthogonal(momenta), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(sharded_as(p, update.to(p.dtype)), alpha=-rate)

    def momentum(self, p: Tensor, factor: float) -> Tensor:
        """Nesterov's momentum of a matrix after its present gradient times ``factor``, whole, in ``dtype``."""
        assert p.grad is not None
        state, grad = self.state[p], p.grad.to(p.dtype)
        if factor != 1:
            grad = grad * factor
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
        state["step"] += 1
        state["momentum"].lerp_(grad, 1 - MOMENTUM)
        return whole(grad.lerp(state["momentum"], MOMENTUM).to(self.dtype))


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (B, n, m) -> those with the same singular vectors and singular values near 1 (0.7 to 1.2)."""
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(s, s, s, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows, gathered if it is sharded; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(like: Tensor, tensor: Tensor) -> Tensor:
    """The part of a tensor, the same on every rank, that this rank keeps of ``like``."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim).redistribute(placements=like.placements)


def build_optimizers(objective: nn.Module, optim: Optim, precision: str = "fp32") -> list[Optimizer]:
    """Fused AdamW with weight decay on matrices only and layer-wise learning rates; with ``optim.matrices`` = "muon"
    the matrices of blocks go to `Muon`, which computes in ``precision``.

    The model says what it is made of: ``layer_of(name) -> int`` (0 = embeddings, i + 1 = block i, ``layers`` + 1 =
    the rest) and ``no_decay(name) -> bool``; parameters outside ``objective.model`` count as the rest. A group's
    ``scale`` is ``layer_decay ** (layers + 1 - layer)``, times ``optim.head`` in the model's ``answer_head``. Source:
    masked.md 1.6, 1.7, 6.5.
    """
    model: Any = objective.model
    top = model.layers + 1
    groups: dict[tuple[bool, int, bool, float], list[Tensor]] = {}
    for name, parameter in objective.named_parameters():
        inside, own = name.startswith("model."), name.removeprefix("model.")
        layer = model.layer_of(own) if inside else top
        decays = parameter.ndim > 1 and not (inside and model.no_decay(own))
        muon = optim.matrices == "muon" and parameter.ndim == 2 and 0 < layer < top
        head = optim.head if inside and own.startswith("answer_head.") else 1.0
        groups.setdefault((muon, layer if optim.layer_decay != 1 else top, decays, head), []).append(parameter)
    described: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for (muon, layer, decays, head), parameters in sorted(groups.items(), key=lambda item: item[0]):
        decay = optim.weight_decay if decays else 0.0
        scale = head * optim.layer_decay ** (top - layer)
        described[muon].append({"params": parameters, "weight_decay": decay, "scale": scale})
    built: list[Optimizer] = [AdamW(described[False], optim)]
    if described[True]:
        built.append(Muon(described[True], optim.lr, torch.bfloat16 if precision == "bf16" else torch.float32))
    return built


def total_norm(objective: nn.Module) -> Tensor:
    """The norm of all gradients together, over all processes: (). Those in bf16 are read once, not cast."""
    found = [p.grad for p in objective.parameters() if p.grad is not None]
    half = [x for x in found if x.dtype.itemsize == 2]
    # Norms of rows are rounded, which is lost among so many; few are cast.
    rows = [torch.linalg.vector_norm(x if x.numel() > SMALL else x.float(), dim=-1) for x in half]
    norms = [x.float().norm() for x in rows]
    return whole(nn.utils.get_total_norm([x for x in found if x.dtype.itemsize > 2] + norms))


def update(optimizers: Sequence[Optimizer], lr: float, norm: float, clip: float) -> None:
    """Move all parameters at the rate ``lr`` times their layer's scale; gradients, which have this norm together, are
    first scaled to ``clip`` if that is less (0 = never).
    """
    factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"], group["factor"] = lr * group["scale"], factor
        optimizer.step()


def optimizer_tensors(objective: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Moments by parameter name: ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, or ``NAME.momentum``; the live tensors."""
    tensors = {}
    for name, state in states(objective, optimizers):
        tensors |= {f"{name}.{moment}": tensor for moment, tensor in state.items() if moment != "step"}
    return tensors


def optimizer_steps(objective: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, int]:
    """Updates every parameter has had, by name; a parameter that never had a gradient is absent."""
    return {name: int(state["step"]) for name, state in states(objective, optimizers)}


def states(objective: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and state of every parameter that has one."""
    for name, parameter in objective.named_parameters():
        for optimizer in optimizers:
            if parameter in optimizer.state:
                yield name, optimizer.state[parameter]


def restore_steps(objective: nn.Module, optimizers: Sequence[Optimizer], steps: Mapping[str, int]) -> None:
    """Create the optimizers' state for exactly these parameters, moments zero, to be filled from a checkpoint."""
    names = {parameter: name for name, parameter in objective.named_parameters()}
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon)
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if names[p] in steps):
            taken = torch.tensor(float(steps[names[parameter]]), device=None if muon else parameter.device)
            moments = ("momentum",) if muon else ("exp_avg", "exp_avg_sq")
            fresh = {moment: torch.zeros_like(parameter) for moment in moments}
            optimizer.state[parameter] = {"step": taken, **fresh}


class Average:
    """Exponential moving average of all parameters; ``decay`` 0 keeps none."""

    def __init__(self, objective: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {}
        if decay:
            self.tensors = {name: p.detach().clone() for name, p in objective.named_parameters()}

    @torch.no_grad()
    def update(self, objective: nn.Module) -> None:
        """Move towards the present weights: ``average = decay * average + (1 - decay) * weight``."""
        if self.decay:
            present = [p.detach() for _, p in objective.named_parameters()]
            torch._foreach_lerp_(list(self.tensors.values()), present, 1 - self.decay)  # type: ignore

    @contextmanager
    def applied(self, objective: nn.Module) -> Iterator[None]:
        """Within, the objective has the averages for weights; afterwards its own again, to the bit."""
        self._swap(objective)
        try:
            yield
        finally:
            self._swap(objective)

    @torch.no_grad()
    def _swap(self, objective: nn.Module) -> None:
        for name, parameter in objective.named_parameters() if self.decay else ():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
