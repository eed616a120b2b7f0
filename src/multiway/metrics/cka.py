"""Centred kernel alignment: how alike two layers represent the same pictures, whatever their widths."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 4
"""Pictures the debiased estimator needs at least."""


def gram(features: Tensor) -> Tensor:
    """Inner products of pictures' features: (n, ...) of any shape -> float64 (n, n).

    The mean picture is subtracted, which changes no estimate and keeps the products exact.
    """
    x = features.detach().reshape(len(features), -1).double()
    x = x - x.mean(0)
    return x @ x.T


def hsic(grams: Tensor) -> Tensor:
    """Debiased Hilbert-Schmidt independence of all pairs of L layers: float64 (L, n, n) of `gram` -> (L, L).

    The mean over batches of pictures estimates that of all of them, without their products. Needs FEWEST pictures.
    Source: Song et al. 2012, eq. 5; batches as Nguyen et al. 2021.
    """
    n = grams.shape[1]
    if n < FEWEST:
        raise ValueError(f"the debiased estimator needs at least {FEWEST} pictures, got {n}")
    grams = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = grams.sum(2)  # (L, n)
    flat, total = grams.flatten(1), rows.sum(1)
    found = flat @ flat.T + torch.outer(total, total) / ((n - 1) * (n - 2)) - rows @ rows.T * 2 / (n - 2)
    return found / (n * (n - 3))


def cka(independence: Tensor) -> Tensor:
    """Linear CKA of all pairs of layers from their (mean) `hsic`: (L, L), 1 on the diagonal.

    0 = unrelated (estimates scatter around it, also below), 1 = the same but for rotation and scale; NaN for a layer
    that shows no difference between pictures.
    """
    own = independence.diagonal()
    own = torch.where(own > 0, own, torch.nan)
    return independence * torch.outer(own, own).rsqrt()
