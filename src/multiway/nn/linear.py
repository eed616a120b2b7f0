"""Linear maps; on CPUs by oneDNN where that is the faster one: in bf16, and in fp32 on AMD processors."""

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

MANY_ROWS = 512
"""From this many rows on, two threads and more are faster at a linear map as a convolution with a kernel of one place:
oneDNN brings its weight into its own layout once, that of a plain product once a thread."""


@cache
def mkl_is_slow() -> bool:
    """Whether torch's fp32 products run at half this processor's rate: MKL keeps AMD processors to AVX2.

    Measured on an EPYC with AVX-512: 90-100 against 180-230 GFLOP/s a core, forward and both gradients.
    """
    listed = Path("/proc/cpuinfo")
    amd = listed.exists() and "AuthenticAMD" in listed.read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@cache
def bf16_is_native() -> bool:
    """Whether oneDNN has bf16 products for this processor; it adds a bias on the way, torch in a pass of its own."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def by_onednn(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN is the faster one for products of x in this dtype."""
    return (
        not torch.compiler.is_compiling()  # first: it must not trace into what asks for the processor
        and x.device.type == "cpu"
        and x.numel() > 0  # oneDNN has no product of nothing
        and ((dtype == torch.bfloat16 and bf16_is_native()) or (dtype == torch.float32 and mkl_is_slow()))
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN; both may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster at a linear map of x (..., C), or of its gradient, as a convolution."""
    many = x.numel() >= MANY_ROWS * x.shape[-1] and torch.get_num_threads() > 1
    return many and x.is_contiguous() and weight.is_contiguous()


def picture(x: Tensor) -> Tensor:
    """The rows of x (..., C) as pixels of one picture (1, C, 1, R), channels last; the same memory."""
    return x.view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of tensors of one dtype by oneDNN, without gradients."""
    if not convolves(x, weight):
        return product(x, weight, bias)
    made = torch.mkldnn_convolution(picture(x), weight[:, :, None, None], bias, (0, 0), (1, 1), (1, 1), 1)
    return made.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def onednn_linear_back(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of what `onednn_linear` was given: (..., O), (O, I) -> (..., I)."""
    if not convolves(grad, weight):
        return product(grad, weight.t())
    given = picture(grad.new_empty(*grad.shape[:-1], weight.shape[1]))  # its shape is looked at, nothing else
    tensors, of_given = (picture(grad), given, weight[:, :, None, None]), (True, False, False)
    made, _, _ = torch.ops.aten.convolution_backward(*tensors, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, of_given)
    return made.permute(0, 2, 3, 1).reshape(*grad.shape[:-1], -1)


def gradient(rows: Tensor, x: Tensor) -> Tensor:
    """``rows.T @ x``, of a weight (O, I), for its result's gradient (R, O) and what it was given, (R, I)."""
    onednn = rows.dtype == torch.float32 and by_onednn(rows, rows.dtype)  # in bf16 torch copies less
    return product(rows.t(), x.t()) if onednn else rows.t() @ x


class OneDNNLinear(torch.autograd.Function):
    """`linear` on CPU, forward and backward by oneDNN, in the dtype of x; autograd casts gradients to parameters'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        """x: (..., I) -> (..., O)."""
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        return onednn_linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        """Gradients of what needs one."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            onednn_linear_back(grad, weight) if of_x else None,
            gradient(rows, x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: (..., I), (O, I), (O,) -> (..., O), by the fastest implementation for the device."""
    dtype = product_dtype(x)
    if dtype == product_dtype(weight) and by_onednn(x, dtype):
        return OneDNNLinear.apply(x.to(dtype), weight, bias)  # type: ignore[return-value]
    return F.linear(x, weight, bias)


def product_dtype(x: Tensor) -> torch.dtype:
    """That of a product of x: its own, or autocast's for fp32 and half-precision numbers."""
    kind = x.device.type
    cast = x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else x.dtype


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
        gain: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """x: (..., I) -> (..., O)."""
        ctx.eps = eps
        dtype = product_dtype(weight)
        _, seen, _, _ = _normed(x, gain, shift, eps)
        cast = weight.to(dtype)
        ctx.save_for_backward(x, gain, shift, cast)
        seen, bias = seen.to(dtype), bias.to(dtype)
        return onednn_linear(seen, cast, bias) if by_onednn(seen, dtype) else F.linear(seen, cast, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of what needs one; autograd casts them to parameters' dtype."""
        x, gain, shift, weight = ctx.saved_tensors
        of_x, _, of_gain, of_shift, of_weight, of_bias = ctx.needs_input_grad
        active, seen, mean, deviation = _normed(x, gain, shift, ctx.eps)
        rows, flat = grad.flatten(0, -2), seen.flatten(0, -2).to(grad.dtype)
        onednn, of_norm = by_onednn(grad, grad.dtype), (None, None)
        of_active = (onednn_linear_back(grad, weight) if onednn else grad @ weight).to(seen.dtype)
        if gain is not None:
            of_active, *of_norm = torch.ops.aten.native_layer_norm_backward(
                of_active, active, gain.shape, mean, deviation, gain, shift, [of_x, of_gain, of_shift]
            )
        return (
            torch.ops.aten.gelu_backward(of_active.to(x.dtype), x) if of_x else None,
            None,
            *of_norm,
            gradient(rows, flat) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _normed(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """GELU(x), its norm, and mean and inverse deviation of each row; without a norm GELU(x) twice."""
    active = F.gelu(x)
    if gain is None:
        return active, active, None, None
    if x.device.type != "cpu":
        active = active.to(gain.dtype)  # as autocast has it there; CPUs norm bf16 with fp32 parameters
    return active, *torch.native_layer_norm(active, gain.shape, gain, shift, eps)  # type: ignore[return-value]


def lean_pays(x: Tensor, to: nn.Linear) -> bool:
    """Whether the memory is worth the time: for wide rows, and so many that two tensors like x take more than the
    weight does with its gradient and AdamW's two moments, all in fp32.
    """
    return to.in_features >= LEAN_WIDTH and 2 * x.numel() * x.element_size() >= 16 * to.weight.numel()


def can_be_lean(norm: nn.Module, to: nn.Linear) -> bool:
    """Whether these are nothing but a LayerNorm or an Identity and a linear map, each with a bias."""
    if type(to) not in (Linear, nn.Linear) or to.bias is None:
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in (norm, to)):
        return False
    return type(norm) is nn.Identity or (type(norm) is nn.LayerNorm and norm.bias is not None)


def lean(x: Tensor, norm: nn.Module, to: nn.Linear) -> Tensor:
    """``to(norm(GELU(x)))``: with gradients only x is kept, the rest, which is cheap, is computed again.

    x: (..., I) -> (..., O). Rows that are narrow or few take the plain way, and so do modules that are more than a
    LayerNorm or an Identity and a biased linear map (adapters, hooks).
    """
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if plain or not lean_pays(x, to) or not can_be_lean(norm, to):
        return to(norm(F.gelu(x)))
    gain, shift, eps = (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else (None, None, 0.0)
    return LeanLinear.apply(x, eps, gain, shift, to.weight, to.bias)  # type: ignore[return-value]
