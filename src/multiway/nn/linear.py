"""Linear maps; in fp32 on AMD processors by oneDNN, which is twice as fast there as torch's default."""

from __future__ import annotations

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
