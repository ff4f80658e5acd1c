"""The learning rate as a pure function of the step, so that no scheduler state exists to be lost or stepped twice.

A new schedule is an entry of `SCHEDULES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What follows the warm-up."""

    description: str  # for --help
    # (step, warmup_steps, total_steps) → the part of the way down to the minimum that is left: 1 at the peak, 0 there
    remaining: Callable[[int, int, int], float]


def _progress(step: int, start: int, total_steps: int) -> float:
    """How far `step` is on the way from `start` to the last step, where it is 1."""
    return max(0.0, min(1.0, (step - start + 1) / max(1, total_steps - start)))


def _cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    return (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps))) / 2


def _linear(step: int, warmup_steps: int, total_steps: int) -> float:
    return 1 - _progress(step, warmup_steps, total_steps)


def _wsd(step: int, warmup_steps: int, total_steps: int) -> float:
    return _linear(step, max(warmup_steps, total_steps - total_steps // 5), total_steps)


SCHEDULES = {
    "cosine": Schedule("decay along half a cosine (SGDR without restarts, arXiv:1608.03983)", _cosine),
    "linear": Schedule("linear decay", _linear),
    "constant": Schedule("no decay", lambda step, warmup_steps, total_steps: 1.0),
    "wsd": Schedule("constant, then linear decay over the last fifth of all steps (arXiv:2404.06395)", _wsd),
}


def default_warmup_steps(total_steps: int) -> int:
    """A twentieth of all steps, at most 2000."""
    return min(2000, total_steps // 20)


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, min_ratio: float, schedule: str
) -> float:
    """Learning rate of optimizer step `step` (the first is 0) out of `total_steps`.

    Linear warm-up over `warmup_steps` steps reaches `peak` on the last of them. Then `schedule`, one of `SCHEDULES`,
    decays it to `min_ratio` of the peak on the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (min_ratio + (1 - min_ratio) * SCHEDULES[schedule].remaining(step, warmup_steps, total_steps))
