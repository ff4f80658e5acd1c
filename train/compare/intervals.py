"""How much a run's speed varied while it ran: its steps in intervals of equal length, each measured by itself."""

import math
from dataclasses import dataclass
from statistics import median

from train.checkpoints.run_folder import FinishedRun

MOST_INTERVALS = 10
FEWEST_INTERVALS = 3  # a range of two values says nothing
FEWEST_STEPS = 3  # in an interval


@dataclass(frozen=True)
class Spread:
    """A metric's value in each of some consecutive intervals of optimizer steps, as `comparison.json` holds it."""

    steps_per_interval: int
    median: float
    low: float
    high: float
    values: list[float]


def spreads(run: FinishedRun) -> dict[str, Spread]:
    """Throughput (tokens/s) and median step time (seconds) of a run's intervals, under their names in `metrics.json`.

    The first step and those under the profiler are left out, as in those metrics, and the few steps after the first
    that do not fill an interval. Empty for a run that is too short, or in which the time of a step is unknown.
    """
    counted = [record for record in run.steps[1:] if not record.get("profiled")]
    times: list[float] = [record.get("step_time_seconds") or 0.0 for record in counted]
    tokens_per_step = run.get("tokens_per_step")
    count = min(MOST_INTERVALS, len(times) // FEWEST_STEPS)
    if count < FEWEST_INTERVALS or not all(times) or not tokens_per_step:
        return {}
    size = len(times) // count
    intervals = [times[start : start + size] for start in range(len(times) - count * size, len(times), size)]
    figures = {
        "tokens_per_second": [tokens_per_step * size / math.fsum(interval) for interval in intervals],
        "step_time_seconds.median": [median(interval) for interval in intervals],
    }
    return {key: Spread(size, median(values), min(values), max(values), values) for key, values in figures.items()}
