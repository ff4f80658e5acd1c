# ruff: noqa: RUF001 (the multiplication sign is what the tables write)
"""Run folders whose files are empty, cut short, or of two runs; what else is refused is in test_compare.py."""

from pathlib import Path

import pytest

from tests.finished_runs import write_run
from train.checkpoints.run_folder import read_run
from train.compare.figures import UNKNOWN, figure_rows
from train.utils.errors import UserError


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_run(folder, "run")
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 3])
def test_steps_that_the_summary_does_not_sum_up(kept: int, tmp_path: Path) -> None:
    steps = write_run(tmp_path / "run") / "metrics.jsonl"
    steps.write_text("".join(steps.read_text().splitlines(keepends=True)[:kept]))
    assert refusal(tmp_path / "run") == (
        f"{steps} has {kept} steps and metrics.json sums up 40: they are of different runs, or incomplete; "
        "train it again"
    )


def test_a_summary_that_is_empty_or_cut_short(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "run") / "metrics.json"
    whole = summary.read_text()
    summary.write_text("")
    assert refusal(tmp_path / "run") == f"{summary}, line 1, column 1: broken JSON (Expecting value)"
    summary.write_text(whole[: len(whole) // 2])
    assert refusal(tmp_path / "run").startswith(f"{summary}, line 1, column ")
    summary.unlink()
    summary.mkdir()
    assert "run is unfinished" in refusal(tmp_path / "run")


def test_energy_has_a_row_where_it_is_known_and_is_compared_where_it_is_of_the_same_devices(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / name, measured={"joules_per_token": joules, "energy_covers": covers}), name)
        for name, joules, covers in (
            ("none", None, None),
            ("boards", 0.1, "boards"),
            ("more", 0.15, "boards"),
            ("machines", 0.01, "machines"),
        )
    ]
    [row] = [row for row in figure_rows(runs[1:]) if row.title == "Energy per token (mJ)"]
    assert row.cells == ["100.0", "150.0", "10.0"]
    assert row.changes == ["+50.0 % (1.50×)", UNKNOWN]
    assert row.good == [False, None]
    assert not [row for row in figure_rows(runs[:1] * 2) if row.title.startswith("Energy")]
