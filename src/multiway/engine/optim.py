"""AdamW, and Muon for the matrices of blocks, over named parameter groups; and the running average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer

from multiway.run import Optim

MOMENTUM, NEWTON_SCHULZ = 0.95, (3.4445, -4.775, 2.0315)
"""Muon's momentum (Nesterov's), and the coefficients of the quintic that it applies five times."""

MATCH_ADAMW = 0.2
"""Root mean square of an update, as AdamW's usually is, so that both take the same rate (Moonlight, section 2.2)."""


TOGETHER = 2**26
"""Most elements of matrices that are orthogonalised at once: all of a small model's, a few of a large one's."""


class Muon(Optimizer):
    """Momentum whose every matrix is replaced by the nearest orthogonal one: all directions are learned alike fast.

    Matrices of one shape are orthogonalised together, in ``dtype``; of a sharded matrix the whole is gathered, since
    the result depends on all of it. Decoupled weight decay as AdamW's. torch's own Muon takes one matrix at a time
    (twice as long for a narrow model on CPU). Source: Jordan et al. 2024, "Muon"; rate as in Moonlight (Liu et al.
    2025).
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "scale": 1.0})
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
        for p, update in zip(matrices, orthogonal(torch.stack([self.momentum(p) for p in matrices])), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(sharded_as(p, update.to(p.dtype)), alpha=-rate)

    def momentum(self, p: Tensor) -> Tensor:
        """Nesterov's momentum of a matrix after its present gradient, whole, in ``dtype``."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
        state["step"] += 1
        state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        return whole(p.grad.lerp(state["momentum"], MOMENTUM).to(self.dtype))


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
    built: list[Optimizer] = [AdamW(described[False], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)]
    if described[True]:
        built.append(Muon(described[True], optim.lr, torch.bfloat16 if precision == "bf16" else torch.float32))
    return built


def set_rate(optimizers: Sequence[Optimizer], lr: float) -> None:
    """Give every group the rate ``lr`` times its layer's scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]


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
