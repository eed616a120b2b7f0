from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from multiway.nn.ffn import FeedForward, NormLinear


def norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + module.eps).sqrt() * module.weight + module.bias


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_norm_linear() -> None:
    module = randomized(NormLinear(nn.LayerNorm(6, eps=1e-5), nn.Linear(6, 3)))
    torch.testing.assert_close(module(X), norm(X, module.norm) @ module.linear.weight.T + module.linear.bias)
    bare = randomized(NormLinear(nn.Identity(), nn.Linear(6, 3)))
    torch.testing.assert_close(bare(X), X @ bare.linear.weight.T + bare.linear.bias)


def test_feed_forward_norms_inside_and_uses_the_exact_gelu() -> None:
    module = randomized(FeedForward(nn.LayerNorm(6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)))
    hidden = norm(X, module.norm) @ module.fc1.weight.T + module.fc1.bias
    hidden = hidden / 2 * (1 + torch.special.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(module(X), norm(hidden, module.inner) @ module.fc2.weight.T + module.fc2.bias)
