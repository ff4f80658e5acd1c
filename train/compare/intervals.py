"""How much a run's speed varied while it ran: its steps in intervals of equal length, each measured by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from train.checkpoints.run_folder import FinishedRun

MOST_INTERVALS = 10
FEWEST_INTERVALS = 3  # a range of two values says nothing
FEWEST_STEPS = 3  # in an interval


@dataclass(frozen=True)
class Spread:
    """A metric's value in each of some consecutive intervals of `steps` optimizer steps."""

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
        return {"steps_per_interval": self.steps, **range_, "values": list(self.values)}


def spreads(run: FinishedRun) -> dict[str, Spread]:
    """Throughput (tokens/s) and median step time (seconds) of a run's intervals, under their names in `metrics.json`.

    The first step and those under the profiler are left out, as in those metrics, and the few steps after the first
    that do not fill an interval. Empty for a run that is too short, or in which the time of a step is unknown.
    """
    times = [record["step_time_seconds"] for record in run.steps[1:] if not record.get("profiled")]
    count = min(MOST_INTERVALS, len(times) // FEWEST_STEPS)
    if count < FEWEST_INTERVALS or not all(times) or not run.get("tokens_per_step"):
        return {}
    size = len(times) // count
    intervals = [times[start : start + size] for start in range(len(times) - count * size, len(times), size)]
    return {
        "tokens_per_second": Spread(size, tuple(throughput(run, interval) for interval in intervals)),
        "step_time_seconds.median": Spread(size, tuple(median(interval) for interval in intervals)),
    }


def throughput(run: FinishedRun, step_times: Sequence[float]) -> float:
    return run.get("tokens_per_step") * len(step_times) / math.fsum(step_times)
