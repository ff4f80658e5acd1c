import math

import pytest

from train.optim.schedule import SCHEDULES, learning_rate


def rates(schedule: str, total: int = 100, warmup: int = 10, min_ratio: float = 0.1) -> list[float]:
    return [
        learning_rate(step, peak=2.0, total_steps=total, warmup_steps=warmup, min_ratio=min_ratio, schedule=schedule)
        for step in range(total)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_climbs_in_equal_steps_and_reaches_the_peak(schedule: str) -> None:
    warmup = rates(schedule)[:10]
    assert warmup == pytest.approx([0.2 * k for k in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_decay_never_rises_and_ends_at_the_minimum(schedule: str) -> None:
    decay = rates(schedule)[10:]
    assert decay == sorted(decay, reverse=True)
    assert decay[-1] == pytest.approx(0.2)


def test_cosine_and_linear_are_half_way_down_in_the_middle() -> None:
    # Step 54 is the 45th of the 90 steps after the warm-up.
    assert rates("cosine")[54] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2))
    assert rates("linear")[54] == pytest.approx(1.1)


def test_wsd_is_stable_until_the_last_fifth() -> None:
    assert set(rates("wsd")[9:80]) == {2.0}
    assert rates("wsd")[80] < 2.0


def test_constant_stays() -> None:
    assert set(rates("constant")[9:]) == {2.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 5), (3, 3)])
def test_short_runs_have_a_positive_rate(schedule: str, total: int, warmup: int) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(schedule, total, warmup))
