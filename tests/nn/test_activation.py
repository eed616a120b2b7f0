"""Activations against their formulas, gradients too; and the FFN that uses them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multiway.nn.activation import Activation, activate
from multiway.nn.ffn import FeedForward
from tests.contracts.toys import randomize


def formula(x: Tensor, activation: Activation) -> Tensor:
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ALL = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])


@ALL
def test_values_and_gradients_are_those_of_the_formula(activation: Activation) -> None:
    x = torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)
    y, want = activate(x, activation), formula(x, activation)
    torch.testing.assert_close(y, want)
    weight = torch.linspace(1, 2, 401, dtype=torch.float64)
    slopes = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, want)]
    torch.testing.assert_close(*slopes)


@ALL
def test_bf16_keeps_its_dtype_and_is_near(activation: Activation) -> None:
    x = torch.linspace(-4, 4, 99).bfloat16()
    got = activate(x, activation)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), formula(x.float(), activation), rtol=2e-2, atol=2e-3)


@ALL
def test_an_ffn_applies_it(activation: Activation) -> None:
    ffn = FeedForward(nn.LayerNorm(6), nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 6), activation)
    randomize(ffn)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    hidden = F.linear(F.layer_norm(x, (6,), ffn.norm.weight, ffn.norm.bias), ffn.fc1.weight, ffn.fc1.bias)
    torch.testing.assert_close(ffn(x), ffn.fc2(formula(hidden, activation)))
