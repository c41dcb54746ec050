"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from functools import cache

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
    stage = main_stage(steps, config)
    if step < stage.start:
        return (step + 1) / stage.start
    if config.name == "constant":
        return 1.0
    start = stage.stop if config.name == "wsd" else stage.start
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


def main_stage(steps: int, config: ScheduleConfig) -> range:
    """The steps between warmup and final decay: the constant stage of wsd; under other schedules all after the warmup.

    Args:
        steps: number of steps of the run.
        config: shape of the schedule.
    """
    warmup = round(config.warmup_fraction * steps)
    decay = round(config.decay_fraction * steps) if config.name == "wsd" else 0
    return range(warmup, max(warmup, steps - decay))


@cache
def peak_steps(steps: int, config: ScheduleConfig, power: int = 1) -> float:
    """Length of the main stage in steps at the peak lr: the sum of its factors.

    Under wsd and constant, that is the number of its steps.

    Args:
        steps: number of steps of the run.
        config: shape of the schedule.
        power: of the lr, to which what is counted is proportional.
    """
    stage = main_stage(steps, config)
    if config.name in ("wsd", "constant"):
        return float(len(stage))
    return sum(schedule_factor(step, steps, config) ** power for step in stage)
