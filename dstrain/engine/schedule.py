"""Learning rates as a pure function of how many steps are done.

The engine calls it before each step and writes the result into the optimizer. A schedule therefore has no state to save, and is
the same under every ZeRO stage.
"""

from __future__ import annotations

import math

from dstrain.engine.config import (
    ConstantSchedule,
    CosineSchedule,
    FallingSchedule,
    InverseSqrtSchedule,
    PolynomialSchedule,
    ScheduleConfig,
    WsdSchedule,
)


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """The rate of the next step after `step` completed ones.

    Warm-up goes straight from `warmup_init` at step 0 to `peak` at step w = `warmup_steps`. After it, with T = `total_steps` and
    r = (T - step) / (T - w), the remaining share, 0 from T on:
    inverse_sqrt: peak * sqrt(w / step); constant: peak; linear: final + (peak - final) * r;
    cosine: final + (peak - final) * (1 - cos(pi r)) / 2; polynomial: final + (peak - final) * r**power;
    wsd: peak until T - decay_steps, then straight down to `final` at T.
    """
    if step < schedule.warmup_steps:
        return schedule.warmup_init + step * (peak - schedule.warmup_init) / schedule.warmup_steps
    if isinstance(schedule, InverseSqrtSchedule):
        return peak * math.sqrt(schedule.warmup_steps / step)
    if isinstance(schedule, ConstantSchedule):
        return peak
    return schedule.final + (peak - schedule.final) * _height(schedule, step)


def _height(schedule: FallingSchedule, step: int) -> float:
    """The value of a falling schedule after warm-up, between `final` (0) and the peak (1)."""
    start = schedule.total_steps - schedule.decay_steps if isinstance(schedule, WsdSchedule) else schedule.warmup_steps
    remaining = min(1.0, max(0.0, (schedule.total_steps - step) / (schedule.total_steps - start)))
    match schedule:
        case CosineSchedule():
            return 0.5 * (1 - math.cos(math.pi * remaining))
        case PolynomialSchedule():
            return float(remaining**schedule.power)
        case _:
            return remaining
