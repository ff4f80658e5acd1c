"""The guard of a run: which updates are not made, because a number is not finite or a spike.

It decides after the backward pass and before the optimizer, from the loss and the gradient norm over all processes, so
every process decides alike, in every layout. The weights of a run that stops are those of the step before.
"""

import math
from collections import deque

import numpy as np

from train.checkpoints.step_folder import GuardState
from train.config.run_config import RunConfig
from train.engines.base import StepResult

WINDOW, SIGMA = 128, 6.0
SKIPS_IN_A_ROW = 20  # after that many, no further update will bring the run back


class Guard:
    """Accepts or refuses the update of each step, and remembers why."""

    def __init__(self, config: RunConfig, state: GuardState) -> None:
        self.on_nonfinite, self.on_spike = config.on_nonfinite, config.on_spike
        self.updates = state.updates
        # Whoever resumes a run that has given up wants another attempt.
        self.skipped_in_a_row = state.skipped_in_a_row % SKIPS_IN_A_ROW
        self.losses = deque(state.losses, maxlen=WINDOW)
        self.grad_norms = deque(state.grad_norms, maxlen=WINDOW)
        self.reason = ""  # why the last step is remarkable; empty if it is not
        self.action = ""  # "warn", "skip" or "stop" then
        self.has_given_up = False  # whether it stops the run because it has skipped too often

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether a step with these numbers updates the weights. A step that stops the run leaves no trace here."""
        self.reason = self.action = ""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.reason, self.action = "non-finite", self.on_nonfinite
        elif self.on_spike != "off" and (is_spike(loss, self.losses) or is_spike(grad_norm, self.grad_norms)):
            self.reason, self.action = "spike", self.on_spike
        if self.action == "skip" and self.skipped_in_a_row == SKIPS_IN_A_ROW:
            self.action, self.has_given_up = "stop", True
        if self.action == "stop":
            return False
        if self.on_spike != "off" and self.reason != "non-finite":
            self.losses.append(loss)
            self.grad_norms.append(grad_norm)
        accepted = self.action != "skip"
        self.skipped_in_a_row = 0 if accepted else self.skipped_in_a_row + 1
        self.updates += accepted
        return accepted

    def finding(self, step: int, result: StepResult, losses: list[tuple[int, int, float]]) -> str:
        """What is remarkable about a step; `losses` are those that are not finite: (rank, micro-batch, loss)."""
        if self.reason == "spike":
            return f"step {step:,}: the loss {result.loss:.3f} or the gradient norm {result.grad_norm:.3f} is a spike"
        if losses:
            rank, number, loss = losses[0]
            others = f" and {len(losses) - 1} more" if len(losses) > 1 else ""
            return f"step {step:,}: the loss is {loss} (rank {rank}, micro-batch {number + 1}{others})"
        return f"step {step:,}: the gradient norm is not finite, but the losses of all micro-batches on all ranks are"

    def state(self) -> GuardState:
        return GuardState(self.updates, self.skipped_in_a_row, list(self.losses), list(self.grad_norms))


def is_spike(value: float, earlier: deque[float]) -> bool:
    """Whether a value is more than `SIGMA` standard deviations above the mean of the values before it.

    The rule, the window and the factor of OLMo-core's `SkipStepOptimizer`, which also begins at half a window. A value
    that was skipped belongs to the window of the next, so that a loss that stays up is a spike only for a while.
    """
    if len(earlier) < WINDOW // 2:
        return False
    return bool(value - np.mean(earlier) > SIGMA * np.std(earlier, ddof=1))
