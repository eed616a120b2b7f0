"""Linear maps; in fp32 on AMD processors by oneDNN, which is twice as fast there as torch's default."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAN_WIDTH = 384
"""Narrower rows are kept as they are: there the time of the calls is worth more than the memory."""


@cache
def mkl_is_slow() -> bool:
    """Whether torch's fp32 products run at half this processor's rate: MKL keeps AMD processors to AVX2.

    Measured on an EPYC with AVX-512: 90-100 against 180-230 GFLOP/s a core, forward and both gradients.
    """
    listed = Path("/proc/cpuinfo")
    amd = listed.exists() and "AuthenticAMD" in listed.read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN; both may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """`linear` in fp32 on CPU, forward and backward by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        """x: (..., I) -> (..., O)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        """Gradients of what needs one."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            product(grad, weight.t()) if of_x else None,
            product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: (..., I), (O, I), (O,) -> (..., O), by the fastest implementation for the device."""
    if (
        not torch.compiler.is_compiling()  # first: it must not trace into what asks for the processor
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel()  # oneDNN has no product of nothing
        and not torch.is_autocast_enabled("cpu")
        and mkl_is_slow()
    ):
        return OneDNNLinear.apply(x, weight, bias)  # type: ignore[return-value]
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)


class QueryKeyValue(nn.Module):
    """The linear map D -> 3 D before attention whose keys have no bias (BEiT; a softmax would not see it).

    ``weight``: (3 D, D), rows of q, k and v; ``q_bias``, ``v_bias``: (D,).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = dim, 3 * dim
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    @property
    def bias(self) -> Tensor:
        """All of it: (3 D,), zero for the keys."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., 3 D)."""
        return linear(x, self.weight, self.bias)


AnyLinear = nn.Linear | QueryKeyValue


class LeanLinear(torch.autograd.Function):
    """`lean`, forward and backward; it keeps x and the weights. ``gain``, ``shift``: of the norm, or None without."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        eps: float,
        gelu: bool,
        gain: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """x: (..., I) -> (..., O)."""
        ctx.gelu, ctx.eps, ctx.dtype = gelu, eps, weight.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        _, seen, _, _ = _normed(x, gelu, gain, shift, eps)
        cast = weight.to(dtype)
        ctx.save_for_backward(x, gain, shift, cast)
        return linear(seen.to(dtype), cast, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of what needs one; those of parameters in their dtype."""
        x, gain, shift, weight = ctx.saved_tensors
        of_x, _, _, of_gain, of_shift, of_weight, of_bias = ctx.needs_input_grad
        active, seen, mean, deviation = _normed(x, ctx.gelu, gain, shift, ctx.eps)
        rows, flat = grad.flatten(0, -2), seen.flatten(0, -2).to(grad.dtype)
        of_active, of_norm = linear(grad, weight.t()).to(seen.dtype), (None, None)
        if gain is not None:
            of_active, *of_norm = torch.ops.aten.native_layer_norm_backward(
                of_active, active, gain.shape, mean, deviation, gain, shift, [of_x, of_gain, of_shift]
            )
        if of_x and ctx.gelu:
            of_active = torch.ops.aten.gelu_backward(of_active.to(x.dtype), x)
        return (
            of_active.to(x.dtype) if of_x else None,
            None,
            None,
            *of_norm,
            linear(rows.t(), flat.t()).to(ctx.dtype) if of_weight else None,
            rows.sum(0).to(ctx.dtype) if of_bias else None,
        )


def _normed(
    x: Tensor, gelu: bool, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What is normed, its norm, and mean and inverse deviation of each row; without a norm only what it would norm."""
    active = F.gelu(x) if gelu else x
    if gain is None:
        return active, active, None, None
    if x.device.type != "cpu":
        active = active.to(gain.dtype)  # as autocast has it there; CPUs norm bf16 with fp32 parameters
    return active, *torch.native_layer_norm(active, gain.shape, gain, shift, eps)  # type: ignore[return-value]


def can_be_lean(norm: nn.Module, to: AnyLinear, gelu: bool) -> bool:
    """Whether these are wide, something is worth computing again, and nothing but a LayerNorm (or, behind GELU, none)
    and a linear map, each with a bias.
    """
    biased = type(to) is QueryKeyValue or (type(to) in (Linear, nn.Linear) and to.bias is not None)
    if to.in_features < LEAN_WIDTH or not biased:
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in (norm, to)):
        return False
    return (type(norm) is nn.LayerNorm and norm.bias is not None) or (gelu and type(norm) is nn.Identity)


def lean(x: Tensor, norm: nn.Module, to: AnyLinear, *, gelu: bool = False) -> Tensor:
    """``to(norm(x))``, or ``to(norm(GELU(x)))``: with gradients only x is kept, the rest is computed again.

    Half of a block's activations are results of norms and of GELU, which are cheap. x: (..., I) -> (..., O). Rows
    narrower than LEAN_WIDTH take the plain way, and so do modules that are more than a LayerNorm (or, behind GELU, an
    Identity) and a biased linear map (adapters, hooks).
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not can_be_lean(norm, to, gelu):
        return to(norm(F.gelu(x) if gelu else x))
    gain, shift, eps = (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else (None, None, 0.0)
    return LeanLinear.apply(x, eps, gelu, gain, shift, to.weight, to.bias)  # type: ignore[return-value]
