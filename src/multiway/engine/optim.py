"""AdamW over named parameter groups, and the running average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from multiway.run import Optim


def build_optimizer(objective: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only and layer-wise learning rates.

    The model says what it is made of: ``layer_of(name) -> int`` (0 = embeddings, i + 1 = block i, ``layers`` + 1 =
    the rest) and ``no_decay(name) -> bool``; parameters outside ``objective.model`` count as the rest. A group's
    ``scale`` is ``layer_decay ** (layers + 1 - layer)``. Source: masked.md 1.6, 1.7.
    """
    model: Any = objective.model
    top = model.layers + 1
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in objective.named_parameters():
        inside, own = name.startswith("model."), name.removeprefix("model.")
        layer = model.layer_of(own) if inside and optim.layer_decay != 1 else top
        decays = parameter.ndim > 1 and not (inside and model.no_decay(own))
        groups.setdefault((layer, decays), []).append(parameter)
    described = [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "scale": optim.layer_decay ** (top - layer),
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(described, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate ``lr`` times its layer's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Both moments by parameter name, ``NAME.exp_avg`` and ``NAME.exp_avg_sq``; the live tensors."""
    tensors = {}
    for name, parameter in objective.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment]
    return tensors


def optimizer_steps(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Updates every parameter has had, by name; a parameter that never had a gradient is absent."""
    return {
        name: int(optimizer.state[parameter]["step"])
        for name, parameter in objective.named_parameters()
        if parameter in optimizer.state
    }


def restore_steps(objective: nn.Module, optimizer: torch.optim.Optimizer, steps: Mapping[str, int]) -> None:
    """Create the optimizer's state for exactly these parameters, moments zero, to be filled from a checkpoint."""
    for name, parameter in objective.named_parameters():
        if name in steps:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps[name]), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


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
