"""The learning rate as a pure function of the step, so that no scheduler state exists to be lost or stepped twice."""

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, min_ratio: float, schedule: str
) -> float:
    """Learning rate of optimizer step `step` (the first is 0) out of `total_steps`.

    Linear warm-up over `warmup_steps` steps reaches `peak` on the last of them. Then `schedule`, one of `SCHEDULES`,
    decays it to `min_ratio` of the peak on the last step: "cosine" is SGDR (arXiv:1608.03983) without restarts, "wsd"
    (arXiv:2404.06395) is constant until the last fifth of all steps and then linear, "constant" does not decay.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = max(warmup_steps, total_steps - total_steps // 5) if schedule == "wsd" else warmup_steps
    progress = max(0.0, min(1.0, (step - start + 1) / max(1, total_steps - start)))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * remaining)
