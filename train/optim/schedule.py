"""The learning rate as a pure function of the step, so that no scheduler state exists to be lost or stepped twice."""

import math
from collections.abc import Callable


def cosine(step: int, start: int, total_steps: int, min_ratio: float) -> float:
    """SGDR, arXiv:1608.03983, without restarts."""
    return min_ratio + (1 - min_ratio) * ((1 + math.cos(math.pi * _progress(step, start, total_steps))) / 2)


def linear(step: int, start: int, total_steps: int, min_ratio: float) -> float:
    return min_ratio + (1 - min_ratio) * (1 - _progress(step, start, total_steps))


def constant(step: int, start: int, total_steps: int, min_ratio: float) -> float:
    return 1.0


def wsd(step: int, start: int, total_steps: int, min_ratio: float) -> float:
    """Warm-up, stable, decay (arXiv:2404.06395): constant until the last fifth of all steps, then linear."""
    return linear(step, max(start, total_steps - total_steps // 5), total_steps, min_ratio)


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}
"""By name, the learning rate at `step` as a fraction of the peak, after a warm-up that ends before the step `start`.

Those that decay reach `min_ratio` on the last step.
"""


def _progress(step: int, start: int, total_steps: int) -> float:
    """The fraction of a decay from `start` to the last step that is done with `step`."""
    return max(0.0, min(1.0, (step - start + 1) / max(1, total_steps - start)))


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, min_ratio: float, schedule: str
) -> float:
    """Learning rate of optimizer step `step` (the first is 0) out of `total_steps`.

    Linear warm-up over `warmup_steps` steps reaches `peak` on the last of them; then comes `schedule`, a name in
    `SCHEDULES`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * SCHEDULES[schedule](step, warmup_steps, total_steps, min_ratio)
