# ruff: noqa: RUF001 (the multiplication sign is what the tables write)
"""Run folders whose files are empty, cut short, or of two runs; what else is refused is in test_compare.py."""

import json
import re
from pathlib import Path

import pytest

from tests.finished_runs import write_run
from train.checkpoints.run_folder import read_run
from train.compare import __main__ as compare
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
        f"{steps} has {kept} steps and metrics.json sums up 40: they are from different runs, or incomplete; "
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


NUMBERS = {"too large": "1e308", "digits": "9" * 5000, "nested": "[" * 100_000 + "]" * 100_000, "none": "-Infinity"}


def with_number(folder: Path, name: str, key: str, number: str) -> Path:
    """A run one of whose files has this in place of a number, in its last line."""
    file = write_run(folder) / name
    if name == "profile/memory.json":
        file.parent.mkdir()
        file.write_text(json.dumps({"schema": 1, key: 1.0, "at_peak": {}, "over_step": []}))
    *before, last = file.read_text().splitlines()
    file.write_text("\n".join([*before, re.sub(rf'"{key}": [\d.]+', f'"{key}": {NUMBERS[number]}', last)]))
    return file


@pytest.mark.parametrize(
    ("name", "number"),
    [("metrics.json", "nested"), *(("profile/memory.json", number) for number in NUMBERS)],
)
def test_numbers_that_are_needed_are_missed_in_one_line(name: str, number: str, tmp_path: Path) -> None:
    file = with_number(tmp_path / "run", name, "peak_bytes" if "memory" in name else "tokens_per_second", number)
    first = write_run(tmp_path / "first")
    with pytest.raises(UserError) as caught:
        compare.main([str(first), str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith(f"{file}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("metrics.jsonl", number) for number in NUMBERS),
        *(("metrics.json", each) for each in ("too large", "digits")),
    ],
)
def test_numbers_that_nothing_measures_are_unknown(name: str, number: str, tmp_path: Path) -> None:
    with_number(tmp_path / "run", name, "tokens_per_second", number)
    first = write_run(tmp_path / "first")
    compare.main([str(first), str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert any("Records missing: run: 1 of 40 steps (40)" in each for each in comparison["warnings"]) == (
        number == "nested"
    )
    assert ("speed unknown" in comparison["verdict"]) == (name == "metrics.json")
