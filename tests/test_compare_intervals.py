import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.finished_runs import write_run
from train.checkpoints.run_folder import FinishedRun, read_run
from train.compare.figures import within_spread
from train.compare.intervals import spreads


def timed_run(step_times: list[float | None], label: str = "run") -> FinishedRun:
    steps = [{"step": step, "step_time_seconds": seconds} for step, seconds in enumerate(step_times, start=1)]
    return FinishedRun(label, Path(label), {"tokens_per_step": 1000}, steps)


def test_intervals_by_hand() -> None:
    # 10 steps: the first is warm-up; 9 make three intervals of three.
    got = spreads(timed_run([100.0, 1, 1, 2, 1, 1, 8, 0.5, 0.5, 1]))
    assert got["tokens_per_second"].values == [750.0, 300.0, 1500.0]
    assert asdict(got["tokens_per_second"]) == {
        "steps_per_interval": 3, "median": 750.0, "low": 300.0, "high": 1500.0, "values": [750.0, 300.0, 1500.0],
    }  # fmt: skip
    assert got["step_time_seconds.median"].values == [1.0, 1.0, 0.5]


def test_steps_under_the_profiler_are_left_out() -> None:
    plain = timed_run([100.0, 1, 1, 2, 1, 1, 8, 0.5, 0.5, 1])
    slow = {"step": 3, "step_time_seconds": 77.0, "profiled": True}
    profiled = FinishedRun("run", plain.folder, plain.summary, [*plain.steps[:3], slow, slow, *plain.steps[3:]])
    assert spreads(profiled) == spreads(plain)


def test_what_does_not_fill_an_interval_is_left_out_at_the_start() -> None:
    spread = spreads(timed_run([9.0] * 6 + [1.0] * 40))["tokens_per_second"]
    assert (spread.steps_per_interval, len(spread.values)) == (4, 10)
    assert spread.values == [1000.0] * 10


@pytest.mark.parametrize("times", [[], [1.0], [1.0] * 9, [1.0] * 20 + [None], [0.0] * 20])
def test_no_intervals_where_they_would_say_nothing(times: list[float | None]) -> None:
    assert spreads(timed_run(times)) == {}


def test_speeds_within_their_own_spread_are_said_to_be_so() -> None:
    steady, slower = timed_run([1.0] * 30, "steady"), timed_run([2.0] * 30, "slower")
    wild = timed_run([1.0] + [0.5] * 15 + [4.0] * 14, "wild")
    assert within_spread(steady, slower) == ""
    assert within_spread(steady, timed_run([1.0] * 30)) == "", "the same speed"
    assert within_spread(steady, wild).startswith("Speeds overlap: over intervals, wild makes 250 to 2,000 tokens/s")
    assert within_spread(steady, timed_run([1.0])) == "", "too short to say"


def test_intervals_of_a_run_folder(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", wobble=0.1), "a")
    spread = spreads(run)["tokens_per_second"]
    times = [
        json.loads(line)["step_time_seconds"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (spread.steps_per_interval, len(spread.values)) == (3, 10)
    assert spread.values[-1] == pytest.approx(3000 / sum(times[-3:]))
