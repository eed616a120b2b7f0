"""Linear maps; in fp32 on AMD processors by oneDNN, which is twice as fast there as torch's default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and mkl_is_slow()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return OneDNNLinear.apply(x, weight, bias)  # type: ignore[return-value]
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)


class LeanLinear(torch.autograd.Function):
    """``linear(before(x))`` that keeps ``x`` alone for the backward, where the cheap ``before`` runs again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, before: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *of: Tensor
    ) -> Tensor:
        """``of``: parameters of ``before``, so that they get gradients."""
        kind = x.device.type
        ctx.before, ctx.of = before, of
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.cast = {"device_type": kind, "dtype": dtype, "enabled": enabled}
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        seen = before(x)
        if enabled:
            seen, weight = seen.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        return linear(seen, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of what needs one."""
        x, weight = ctx.saved_tensors
        _, of_x, of_weight, of_bias, *rest = ctx.needs_input_grad
        with torch.enable_grad(), torch.autocast(**ctx.cast):
            x = x.detach().requires_grad_(of_x)
            seen = ctx.before(x)
        rows = grad.reshape(-1, grad.shape[-1])
        wanted = [y for y, need in zip((x, *ctx.of), (of_x, *rest), strict=True) if need]
        found = iter(())
        if wanted:
            found = iter(torch.autograd.grad(seen, wanted, linear(grad, weight.t()).to(seen.dtype)))
        flat = seen.detach().reshape(-1, seen.shape[-1]).to(rows.dtype)
        return (
            None,
            next(found) if of_x else None,
            linear(rows.t(), flat.t()).to(ctx.dtypes[0]) if of_weight else None,
            rows.sum(0).to(ctx.dtypes[1]) if of_bias else None,
            *(next(found) if need else None for need in rest),
        )


def lean(before: Callable[[Tensor], Tensor], of: Iterable[Tensor], to: nn.Linear, x: Tensor) -> Tensor:
    """``to(before(x))``; with gradients only x is kept, and ``before`` (norm, activation: cheap) is computed again.

    ``of``: the parameters of ``before``. Half of a block's activations are results of norms and of GELU.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return to(before(x))
    return LeanLinear.apply(before, x, to.weight, to.bias, *of)  # type: ignore[return-value]
