import sys
from pathlib import Path

import pytest

from benchmarks import profiling, training_runs
from train.config.run_config import parse
from train.utils.errors import UserError


def test_the_recorded_steps_lie_outside_of_the_timed_ones() -> None:
    steps = 20
    timed = range(profiling.WARM_UP_STEPS + 1, steps - profiling.LAST_STEPS + 1)
    flags = training_runs.training_flags(Path("train.bin"), "tiny", 16, steps, "no")
    recorded = [parse([*flags, *more]).profiled for more in profiling.sides(steps).values()]
    assert recorded[0] is None
    for found in recorded[1:]:
        assert found is not None
        with_warm_up = range(found.start - 1, found.stop)
        assert not set(with_warm_up) & set(timed)
        assert found.stop <= steps + 1


def test_a_side_is_held_against_its_own_round() -> None:
    base, own = [[0.1, 0.1, 0.4], [0.2, 0.2, 0.2]], [[0.11, 0.11, 0.11], [0.19, 0.2, 0.3]]
    assert profiling.row("after", base, own) == ["after", "155.0 (110.0 to 200.0)", "5.0 (0.0 to 10.0)", "10.0"]


def test_too_few_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["profiling", "--steps", "7"])
    with pytest.raises(UserError, match="--steps 7: no step is timed; give more than 7"):
        profiling.main()


@pytest.mark.slow
def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["profiling", "--block=16", "--steps=9", "--rounds=1"])
    profiling.main()
    assert "| after the recorded step" in capsys.readouterr().out
