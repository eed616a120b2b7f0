"""Learning rates and decays as functions of the step."""

from __future__ import annotations

import math

from multiway.run import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int) -> float:
    """Rate of optimiser step ``step`` (from 0): linear from 0 over ``warmup`` steps, half a cosine to ``final_lr``.

    Source: BEiT's per-step schedule (masked.md 1.8).
    """
    if step < schedule.warmup:
        return peak * step / max(1, schedule.warmup - 1) if schedule.warmup > 1 else peak
    share = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.final_lr + 0.5 * (peak - schedule.final_lr) * (1 + math.cos(math.pi * min(1.0, share)))
