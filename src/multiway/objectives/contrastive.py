"""Contrast between two views of the same things: CLIP's symmetric InfoNCE, and SigLIP's sigmoid of every pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Negatives = Literal["gathered", "detached", "local"]
"""Whom a pair is compared with.

``gathered``: the pairs of all processes, with gradient through the gather (BEiT-3, FLAVA; open_clip's ``local_loss``
with ``gather_with_grad``). ``detached``: the same gradient without that exchange: every process scores all pairs, of
which its own features alone carry one (VLMo, and open_clip by default; their gradients of features are divided by the
number of processes, ours are not). ``local``: the pairs of the process alone, another loss.
"""


def symmetric_cross_entropy(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    gather: Callable[[Tensor], Tensor],
    rank: int,
    negatives: Negatives = "gathered",
) -> tuple[Tensor, Tensor]:
    """Loss and hit of every local pair among all pairs of all ranks.

    a, b: unit vectors (B, D), row i of one belongs to row i of the other; ``scale`` multiplies the cosines; ``gather``
    concatenates (B, D) over ranks with gradient, ``rank`` is this rank's place in it. Returns the mean of both
    directions' losses and of their hits (the partner is the nearest of all), float32 (B,) each.
    Source: masked.md 1.9; the sum of losses over ranks is that of one process, but with ``local`` negatives.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, scale = a.float(), b.float(), scale.float()
        own = torch.arange(len(a), device=a.device) + (0 if negatives == "local" else rank * len(a))
        if negatives == "local":
            return _among(a, b, a, b, own, scale)
        if negatives == "gathered":
            return _among(a, b, gather(a), gather(b), own, scale)
        all_a, all_b = _with_own(gather(a.detach()), a, rank), _with_own(gather(b.detach()), b, rank)
        loss, hit = _among(a, b, all_a, all_b, own, scale)
        # Other ranks' pairs count there; here only for what our features, among their negatives, do to them.
        place = torch.arange(len(all_a), device=a.device)
        others = torch.cat([place[: rank * len(a)], place[(rank + 1) * len(a) :]])
        rest = _among(all_a[others], all_b[others], all_a, all_b, others, scale.detach())[0].sum()
        return loss + (rest - rest.detach()) / len(a), hit


def _among(a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, place: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and hit of pairs among all pairs, of which they are those at ``place``."""
    to_b, to_a = scale * a @ all_b.T, scale * b @ all_a.T  # (B, all)
    loss = (F.cross_entropy(to_b, place, reduction="none") + F.cross_entropy(to_a, place, reduction="none")) / 2
    hit = ((to_b.argmax(-1) == place).float() + (to_a.argmax(-1) == place).float()) / 2
    return loss, hit.detach()


def _with_own(everyone: Tensor, own: Tensor, rank: int) -> Tensor:
    """All ranks' rows, of which ours carry gradient."""
    return torch.cat([everyone[: rank * len(own)].detach(), own, everyone[(rank + 1) * len(own) :].detach()])


def pairwise_sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, gather: Callable[[Tensor], Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Loss and hit of every local a among the b of all ranks, each of them its partner or not: a question of its own.

    a, b, ``gather``, ``rank`` as in `symmetric_cross_entropy`; a score is ``scale`` times the cosine plus ``bias``.
    Returns the sum over all b of -log sigmoid(score of the partner) and -log sigmoid(-score of another), and whether
    the partner scores highest, float32 (B,) each. Scores are made for the b of one rank at a time.
    Source: SigLIP, algorithm 1.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, scale, bias = a.float(), b.float(), scale.float(), bias.float()
        loss, partner, best = a.new_zeros(len(a)), a.new_zeros(len(a)), a.new_full((len(a),), float("-inf"))
        for number, part in enumerate(gather(b).split(len(b))):
            scores = scale * a @ part.T + bias  # (B, B)
            loss = loss + F.softplus(scores).sum(1)
            best = torch.maximum(best, scores.detach().amax(1))
            if number == rank:
                partner = scores.diagonal()
        return loss - partner, (partner.detach() >= best).float()  # softplus(s) - s = softplus(-s)
