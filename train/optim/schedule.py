"""The learning rate as a pure function of the step, so that no scheduler state exists to be lost or stepped twice."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    min_ratio: float,
    schedule: Literal["cosine", "linear", "constant", "wsd"],
) -> float:
    """Learning rate of optimizer step `step` (the first is 0) out of `total_steps`.

    Linear warm-up over `warmup_steps` steps reaches `peak` on the last of them. Then `cosine` (SGDR, arXiv:1608.03983)
    and `linear` fall to `min_ratio * peak` on the last step, `constant` stays, and `wsd` (warm-up, stable, decay,
    arXiv:2404.06395) stays until the last fifth of all steps and falls linearly over it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    first = max(warmup_steps, total_steps - total_steps // 5) if schedule == "wsd" else warmup_steps
    done = max(0.0, min(1.0, (step - first + 1) / max(1, total_steps - first)))
    remaining = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return peak * (min_ratio + (1 - min_ratio) * remaining)
