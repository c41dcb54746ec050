"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from lit_mult.config import ScheduleConfig


def schedule_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Factor on the peak learning rate for one optimizer step.

    The warmup rises linearly and reaches 1 on its last step; the last step of the run has `final_ratio` (except under
    `constant`).

    Args:
        step: index of the step, from 0.
        steps: number of steps of the run.
        config: shape of the schedule; wsd decays exponentially (arXiv:2601.04890, training recipe).
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    start = max(warmup, steps - round(config.decay_fraction * steps)) if config.name == "wsd" else warmup
    if step < start or start >= steps:
        return 1.0
    progress = min(1.0, (step + 1 - start) / (steps - start))
    match config.name:
        case "wsd":
            return float(config.final_ratio**progress)
        case "cosine":
            return config.final_ratio + (1 - config.final_ratio) * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return 1 + (config.final_ratio - 1) * progress
