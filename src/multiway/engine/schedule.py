"""Learning rates and decays as functions of the step."""

from __future__ import annotations

import math

from multiway.run import Schedule

STEP_AT, STEP_TO = 7 / 8, 0.1


def learning_rate(schedule: Schedule, peak: float, step: int) -> float:
    """Rate of optimiser step ``step`` (from 0): linear over the warm-up, then as the schedule's shape says.

    Source: BEiT's per-step schedule (masked.md 1.8); SimMIM's (vision.md 2.2, 7.3).
    """
    if step < schedule.warmup:
        first = schedule.first_lr
        return first + (peak - first) * step / (schedule.warmup - 1) if schedule.warmup > 1 else peak
    if schedule.shape == "step":
        return peak if step < STEP_AT * schedule.steps else STEP_TO * peak
    before = 0 if schedule.shape == "late cosine" else schedule.warmup
    share = min(1.0, (step - before) / max(1, schedule.steps - before))
    left = 1 - share if schedule.shape == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return schedule.final_lr + (peak - schedule.final_lr) * left
