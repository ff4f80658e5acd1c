"""How much a run's speed varied while it ran: its steps in windows of equal length, each measured by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from train.checkpoints.run_folder import Run

MOST_WINDOWS = 10
FEWEST_WINDOWS = 3  # a range of two values says nothing
FEWEST_STEPS = 3  # in a window


@dataclass(frozen=True)
class Spread:
    """A figure's value in each of some consecutive windows of `steps` optimizer steps."""

    steps: int
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def overlaps(self, other: "Spread") -> bool:
        return self.low <= other.high and other.low <= self.high

    def as_json(self) -> dict[str, Any]:
        """What `comparison.json` holds of it."""
        range_ = {"median": self.median, "low": self.low, "high": self.high}
        return {"steps_per_window": self.steps, **range_, "values": list(self.values)}


def spreads(run: Run) -> dict[str, Spread]:
    """Throughput (tokens/s) and median step time (seconds) of a run's windows, under their names in `metrics.json`.

    The first step is left out and those under the profiler, as in those figures, and then the few that do not fill a
    window. Empty for a run that is too short, or of which a step's time is not known.
    """
    times = [record["step_time_seconds"] for record in run.steps[1:] if not record.get("profiled")]
    count = min(MOST_WINDOWS, len(times) // FEWEST_STEPS)
    if count < FEWEST_WINDOWS or not all(times) or not run.get("tokens_per_step"):
        return {}
    size = len(times) // count
    windows = [times[start : start + size] for start in range(len(times) - count * size, len(times), size)]
    return {
        "tokens_per_second": Spread(size, tuple(throughput(run, window) for window in windows)),
        "step_time_seconds.median": Spread(size, tuple(median(window) for window in windows)),
    }


def throughput(run: Run, step_times: Sequence[float]) -> float:
    return run.get("tokens_per_step") * len(step_times) / math.fsum(step_times)
