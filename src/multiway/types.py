"""The contracts every part of multiway is written against: errors, batches, objectives.

A **batch** is a plain ``dict`` with this closed vocabulary (B images, R text tokens, S samples, P patches):

| key | type, shape | meaning |
|---|---|---|
| `plan` | `Plan` | how the tokens of all samples lie in one matrix |
| `image` | uint8 (B, 3, H, W) | pictures, RGB; those of image-only samples first, then those of pairs |
| `image_hide` | bool (B, P) | True = this patch is hidden from the model and must be predicted |
| `image_hidden` | int64 (M,) | True places of ``image_hide``, flat, ascending; none of pairs without ``match`` |
| `image_keep` | int64 (B, K) | the patches that are read at all, ascending; absent = every patch |
| `image_code` | int64 (B, P) | visual token of every patch; absent when the objective computes them |
| `text` | int64 (R,) | token ids of all texts, packed: those of pairs first, then text-only |
| `text_hidden` | int64 (K,) | indices into ``text`` of the tokens to predict, ascending |
| `text_target` | int64 (K,) | the ids that stood there before corruption |
| `image_match` | int64 (A,) | numbers of the pictures that are contrasted, among all pictures |
| `text_match` | int64 (A,) | numbers of their texts, among all texts; absent = all, in order |
| `drop_path` | float32 (2 L, S) | uniform draws in [0, 1) per branch and sample; absent = nothing is dropped |
| `sample` | int64 (S,) | number of each record in its kind's source, in plan order |
| `match` | bool (A,) | of every pair that is read jointly: True = its picture and its text belong together |
| `match_plan` | `Plan` | all pairs together, four times: words hidden, whole, another picture, another text (padded) |
| `match_draw` | float32 (A, 2) | uniform draws in [0, 1) that choose another text and another picture for it |
| `label` | int64 (B,) | class of each picture, text or example (fine-tuning tasks) |
| `score` | float32 (B, C) | how right each of C answers is, in [0, 1] (visual question answering) |
| `value` | float32 (B,) | number that is to be predicted (similarity of two texts) |
| `erase_box` | int64 (B, 4) | top, left, height, width in pixels of the part to fill with noise; height 0 = none |
| `erase_noise` | float32 (E,) | what fills them, N(0, 1): (3, height, width) of every box, packed in order |
| `mix_share` | float32 (B,) | share of itself that each picture keeps, the rest is its neighbour's (2i and 2i + 1) |
| `mix_box` | int64 (B, 4) | part taken from the neighbour, as ``erase_box``; height 0 = both are blended whole |

Everything random in a batch was drawn when it was collated, from (seed, epoch, record): an objective is a
deterministic function of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multiway.plan import Plan, Tokens

__all__ = ["Across", "Batch", "Objective", "Plan", "StepOutput", "Tokens", "move"]

Batch = dict[str, Any]


def move(batch: Batch | Sequence[Batch], device: torch.device) -> Any:
    """Return the batch, or all of several, with every tensor (the plan's included) on ``device``."""
    if not isinstance(batch, Mapping):
        return [move(part, device) for part in batch]
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


@dataclass(frozen=True)
class Across:
    """What an objective may do across processes; the default is one process.

    ``gather``: (B, ...) of this rank -> (world * B, ...) of all ranks, rank order; floats with gradient.
    ``total``: sum of a tensor over all ranks, without gradient.
    ``rank``, ``world``: this process and how many there are.
    """

    gather: Callable[[Tensor], Tensor] = lambda x: x
    total: Callable[[Tensor], Tensor] = lambda x: x
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class StepOutput:
    """One micro-batch's result.

    ``loss``: scalar, ``sum_k weight_k * sum_k / counts_k`` with counts of the whole optimiser step over all ranks,
    so that adding the losses of all micro-batches and ranks gives the loss of the global batch exactly.
    ``sums``: detached scalars; ``sums["x"]`` and ``sums["x/anything"]`` are both reported divided by ``counts["x"]``.
    """

    loss: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """A model together with the loss it is trained by: what the loop trains, FSDP shards and a checkpoint stores."""

    splittable: bool = True
    """Whether the loss of a batch is the sum of the losses of its parts (contrastive losses are not)."""

    joins: bool = False
    """Whether, where it is not splittable, `forward` also takes a list of all micro-batches of a step, as one batch."""

    model: Any
    """What is trained: an ``nn.Module`` with the verbs its objective uses, ``encoder.blocks``, ``layers``,
    ``layer_of``.
    """

    def counts(self, batch: Batch) -> dict[str, int]:
        """Number of items of every loss term in a batch on the CPU, before any forward."""
        raise TypeError(f"{type(self).__name__} does not say how many items its terms have: define counts()")

    def forward(self, batch: Batch, counts: Mapping[str, float], across: Across = Across()) -> StepOutput:
        """Loss of one micro-batch; ``counts`` are those of the whole optimiser step over all ranks."""
        raise TypeError(f"{type(self).__name__} has no loss: define forward()")

    def init_weights(self) -> None:
        """Initialise every parameter in place from the global generator."""
        raise TypeError(f"{type(self).__name__} does not say how it is initialised: define init_weights()")

    def after_step(self, step: int) -> None:
        """Called after each optimiser step (teachers that follow the student, codebooks)."""

    def apply_model(self, fn: Callable[[nn.Module], Any]) -> Any:
        """Call ``fn(model)``; under FSDP this is how an evaluation reaches the gathered model."""
        return fn(self.model)
